import json,torch,pandas as pd,sys
sys.path.insert(0,'/work/run/figures')
from execnb.shell import CaptureShell
import shutil,re
p='/work/main/nbs/experiments/students.ipynb'; d=json.load(open(p))
c=next(c for c in d['cells'] if 'fig-kinship' in ''.join(c['source']))
pre='''import torch, pandas as pd
from letkd.results.tables import new_figure
o=torch.load('/work/run/inside/ex2.pt'); between=~torch.eye(100,dtype=bool)
pairs=pd.DataFrame({'told':o['Q'][between],'said':o['P'][between]}); print(pairs.corr('spearman').told.said)'''
mini=dict(cells=[dict(cell_type='code',id='a',metadata={},execution_count=None,outputs=[],source=pre.splitlines(True)),
 dict(c,outputs=[])],metadata=d['metadata'],nbformat=4,nbformat_minor=5)
json.dump(mini,open('/work/run/inside/x/mini.ipynb','w'))
from pathlib import Path
m=Path('/work/run/inside/x/mini.ipynb'); CaptureShell(m).execute(m,m,exc_stop=True)
o=json.load(open(m)); print(o['cells'][0]['outputs'][0].get('text')); c['outputs']=o['cells'][1]['outputs']
json.dump(d,open(p,'w'),indent=1,ensure_ascii=False,sort_keys=True); open(p,'a').write('\n')
