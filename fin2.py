import json,base64,re,secrets
p='/work/run/inside/page_final.txt'; s=open(p).read()
def r(a,b):
    global s
    assert s.count(a)==1,(a,s.count(a)); s=s.replace(a,b)
r("So is its other half, that supervision alone does not bring this: QuEST's map, which is supervised and has no embedding, reads no better than KD's. But the two rows","So is its other half, that supervision without an embedding doesn't bring this: QuEST's map reads like the input of letKD-1's layer. But the two rows")
r("Supervision adds one or two points to that, and KD, whose student reads best at every place, more.","letKD's supervision adds 1.9 points to that difference and KD 1.2, and KD's student reads better on both sides of the layer.")
r("by a student a third as large","by a student of a third of its blocks")
r("sides of apples, and a yellow pear;","round red fruit and a yellow one;")
r("follows what its target says, over two orders of magnitude.","follows what its target says, over the whole range.")
open(p,'w').write(s)
run=json.load(open('/work/run/inside/x/students_run.ipynb'))
key=lambda c: re.sub(r'/work/run/runs','../../runs',''.join(c['source']))
norm=lambda t: re.sub(r'^#\| fig-(cap|alt):.*\n','',t,flags=re.M).strip()
outs={norm(key(c)):c['outputs'] for c in run['cells'] if c['cell_type']=='code'}
cells=[];miss=[]
for part in re.split(r'^#=# ',s,flags=re.M)[1:]:
    k,_,b=part.partition('\n'); b=b.strip('\n')
    c=dict(cell_type=k.split()[0],id=secrets.token_hex(4),metadata={},source=b.splitlines(keepends=True))
    if c['cell_type']=='code':
        c.update(execution_count=None,outputs=outs.get(norm(b),[]))
        if norm(b) not in outs: miss.append(b[:60])
    cells.append(c)
print('no outputs:',miss)
d=dict(cells=cells,metadata=run['metadata'],nbformat=4,nbformat_minor=5)
json.dump(d,open('/work/main/nbs/experiments/students.ipynb','w'),indent=1,ensure_ascii=False,sort_keys=True); open('/work/main/nbs/experiments/students.ipynb','a').write('\n')
