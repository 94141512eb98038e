from .zoo import create_model, model_names
