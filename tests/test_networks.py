"""Networks of ten families, as students and as teachers.

Their maps lie in their tensors in many ways, and nothing fails where one is misread.
"""
import copy

import pytest
import torch
import torchvision.models as tv
from torchvision.models.convnext import CNBlockConfig

from letkd.distiller import Distiller, Setup
from letkd.methods import create_terms, method_options
from letkd.models import create_model
from letkd.taps import as_maps, capture, evaluating

pytestmark = pytest.mark.filterwarnings('error:.*does not reach the logits')
H, W, CLASSES = 64, 32, 3  # images are not square, so that a transposed or guessed grid is seen


def timm(name, **options):
    return lambda: pytest.importorskip('timm').create_model(name, num_classes=CLASSES, **options)


def mixer():
    pytest.importorskip('timm')
    from timm.models.mlp_mixer import MlpMixer
    return MlpMixer(num_classes=CLASSES, img_size=(H, W), patch_size=8, num_blocks=2, embed_dim=64)


def torchvision(name): return lambda: tv.get_model(name, weights=None, num_classes=CLASSES)


def tv_convnext():
    return tv.convnext.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)],
                                num_classes=CLASSES)


def tv_swin(): return tv.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=CLASSES)


# Family: (how it is made, a tap in the middle, the last map's tap, pixels to a place at the one and
# at the other, layouts at the one and at the other).
FAMILIES = {
    'torchvision/resnet18': (torchvision('resnet18'), 'layer3.0', 'layer3', 16, 16, '', ''),
    'torchvision/mobilenet_v3_small': (torchvision('mobilenet_v3_small'), 'features.4',
                                       'features.8', 16, 16, '', ''),
    'torchvision/efficientnet_b0': (torchvision('efficientnet_b0'), 'features.4', 'features.5', 16,
                                    16, '', ''),
    'torchvision/regnet_y_400mf': (torchvision('regnet_y_400mf'), 'trunk_output.block2',
                                   'trunk_output.block3', 8, 16, '', ''),
    'torchvision/convnext': (tv_convnext, 'features.1', 'features.3', 4, 8, '', ''),
    'torchvision/swin': (tv_swin, 'features.1', 'norm', 4, 8, '@BHWC', '@BHWC'),
    'timm/resnet18': (timm('resnet18'), 'layer3.0', 'layer3', 16, 16, '', ''),
    'timm/vit_tiny': (timm('vit_tiny_patch16_224', img_size=(H, W), patch_size=8, depth=3),
                      'blocks.0', 'blocks.1', 8, 8,
                      '@1+8x4', '@1+8x4'),
    'timm/deit_tiny_distilled': (timm('deit_tiny_distilled_patch16_224', img_size=(H, W),
                                      patch_size=8, depth=2), 'blocks:input',
                                 'blocks.0', 8, 8, '@2+8x4', '@2+8x4'),
    'timm/swin_tiny': (timm('swin_tiny_patch4_window7_224', img_size=(H, W), depths=(1, 1),
                            embed_dim=24, num_heads=(1, 2)),
                       'layers.0', 'norm', 4, 8, '@BHWC', '@BHWC'),
    'timm/convnext_atto': (timm('convnext_atto'), 'stages.1', 'stages.2', 8, 16, '', ''),
    'timm/mobilenetv3_small_050': (timm('mobilenetv3_small_050'), 'blocks.1', 'blocks.3', 8,
                                   16, '', ''),
    'timm/efficientnet_b0': (timm('efficientnet_b0'), 'blocks.3', 'blocks.4', 16, 16, '', ''),
    'timm/regnety_004': (timm('regnety_004'), 's2', 's3', 8, 16, '', ''),
    'timm/repvgg_a0': (timm('repvgg_a0'), 'stages.1', 'stages.2', 8, 16, '', ''),
    'timm/mobilevit_xxs': (timm('mobilevit_xxs'), 'stages.2', 'stages.3', 8, 16, '', ''),
    'timm/mlp_mixer': (mixer, 'blocks.0', 'norm', 8, 8, '@8x4', '@8x4'),
}


@pytest.fixture(scope='module')
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 3, H, W), torch.arange(6) % CLASSES


def cnn(): return create_model('resnet8x0.5', CLASSES)


def one_step(method, student, teacher, batch, pairs):
    """A step of a method, and what it must leave behind. `pairs`: (student's tap, teacher's tap) in
    the middle and at the end."""
    images, labels = batch
    with evaluating(student): plain = student(images)
    keys = list(student.state_dict())
    options = dict(num_prototypes=4, num_dims=2, per_class=1, stages=pairs, hint=pairs[0])
    options = {name: options[name] for name in options.keys() & method_options(method).keys()}
    terms = create_terms(method, student, teacher, [batch], penultimate=pairs[1],
                         intermediate=pairs[0], **options)
    distiller = Distiller(student, teacher, terms).train()
    logits, losses = distiller(images, labels, progress=0.)
    assert logits.shape == (len(images), CLASSES)
    assert not [name for name, loss in losses.items() if not loss.isfinite()]
    sum(losses.values()).backward()
    for name, loss in losses.items(): assert loss >= 0, name
    assert any(p.grad is not None and p.grad.abs().sum() > 0
               for key, p in student.named_parameters() if 'kd_layer' not in key)
    assert distiller.layers
    assert all(layer.templates.grad.abs().sum() > 0 for layer in distiller.layers.values())
    assert all(p.grad is None for p in teacher.parameters())
    with evaluating(student), evaluating(twin := copy.deepcopy(student)):
        assert torch.equal(twin(images), student(images))
    distiller.remove()
    assert list(student.state_dict()) == keys
    assert not [m for m in student.modules() if m._forward_hooks or m._forward_pre_hooks]
    with evaluating(student): assert student(images).shape == plain.shape


@pytest.mark.parametrize('name', FAMILIES)
def test_reads_the_maps_of_a_family(name, batch):
    make, near, last, *strides, at_near, at_last = FAMILIES[name]
    setup = Setup(make(), None, [batch])
    for tap, stride, layout in ((near, strides[0], at_near), (last, strides[1], at_last)):
        found, _, grid = setup.place('student', tap)
        assert (found, grid) == (tap + layout, (H // stride, W // stride))


@pytest.mark.parametrize('method', ['letkd2+at+fitnet+sp', 'quest'])
@pytest.mark.parametrize('name', FAMILIES)
def test_learns_from_a_cnn(name, method, batch):
    torch.manual_seed(1)
    make, near, last, *_ = FAMILIES[name]
    one_step(method, make(), cnn(), batch, ((near, 'layer2'), (last, 'layer3')))


@pytest.mark.parametrize('method', ['letkd2+at+fitnet+sp', 'quest'])
@pytest.mark.parametrize('name', FAMILIES)
def test_teaches_a_cnn(name, method, batch):
    torch.manual_seed(2)
    make, near, last, *_ = FAMILIES[name]
    one_step(method, cnn(), make(), batch, (('layer2', near), ('layer3', last)))


# network: its tokens before the patches
VITS = {'vit_tiny_patch16_224': 1, 'deit_tiny_distilled_patch16_224': 2,
        'vit_medium_patch16_reg4_gap_256': 4}


@pytest.mark.parametrize('name', VITS)
def test_each_patch_stands_at_its_place(name):
    """Without position embeddings and blocks, the tokens are the patches that the network's
    convolution made, a map B x C x H x W."""
    vit = timm(name, img_size=(H, W), patch_size=8, depth=1, embed_dim=48, num_heads=2)()
    vit.pos_embed.data.zero_()
    images = torch.randn(2, 3, H, W)
    with evaluating(vit), capture(vit, ['patch_embed.proj', 'blocks:input',
                                        'blocks:input@raw']) as found:
        vit(images)
    maps = as_maps(vit, found, images)
    assert found['blocks:input'].shape[1] == VITS[name] + 8 * 4
    assert torch.equal(maps['blocks:input'], maps['patch_embed.proj'])
    assert maps['blocks:input@raw'] is found['blocks:input@raw']


def test_a_layer_leaves_the_tokens_before_the_patches(batch):
    vit = timm('deit_tiny_distilled_patch16_224', img_size=(H, W), patch_size=8, depth=2)()
    terms = create_terms('letkd1', vit, cnn(), [batch], penultimate=('blocks.0', 'layer3'),
                         num_prototypes=4)
    term, layer = terms[1], terms[1].layers['blocks.0@2+8x4']
    distiller = Distiller(vit, cnn(), terms).eval()
    with torch.no_grad(), capture(vit, ['blocks.0.kd_layer:input', 'blocks.0']) as maps:
        distiller(*batch)
    before, after = maps['blocks.0.kd_layer:input'], maps['blocks.0']
    assert torch.equal(after[:, :2], before[:, :2])
    assert torch.equal(after[:, 2:], layer(before[:, 2:]))
    assert distiller.targets(*batch)[term.student_tap].shape == (6 * 8 * 4, 4)


def test_says_which_size_a_network_takes(batch):
    vit = tv.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16,
                               num_classes=CLASSES)
    with pytest.raises(ValueError, match=f"student's network, a VisionTransformer, does not take "
                       f"images of 3 x {H} x {W}: Wrong image height"):
        create_terms('letkd1', vit, cnn(), [batch], penultimate=('encoder.ln', 'layer3'),
                     num_prototypes=4)


def test_a_layout_may_be_named(batch):
    vit = timm('vit_tiny_patch16_224', img_size=(H, W), patch_size=8, depth=2)()
    at = lambda tap: create_terms('letkd1', vit, cnn(), [batch], penultimate=(tap, 'layer3'),
                                  num_prototypes=4)[1].student_tap
    assert at('blocks.0') == at('blocks.0@1+8x4') == 'blocks.0@1+8x4'
    with pytest.raises(ValueError, match="student's tap 'blocks.0@BHWC': layout BHWC: found a "
                       "tensor 2 x 33 x 192; expected four dimensions"):
        at('blocks.0@BHWC')
