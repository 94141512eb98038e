"""The story as a reader runs it: JupyterLab in a browser without a screen, "Run All".

It needs Chromium (Debian's package `chromium`), and is skipped in CI, which has no time for it.
`pytest tests/test_jupyterlab.py --basetemp DIR` keeps a picture of each chapter in DIR.
"""
import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import pytest

from conftest import NBS, STORY, copy_project
from lives import free_port

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = pytest.mark.skipif(not CHROMIUM or bool(os.environ.get('CI')),
                                reason='no Chromium, or no time for it')
RUN_ALL = '''(async () => {
  const app = window.jupyterapp; await app.restored;
  const panel = await app.commands.execute('docmanager:open',
                                           {path: NAME, kernel: {name: 'python3'}});
  await panel.context.ready; await panel.sessionContext.ready; await panel.revealed;
  await app.commands.execute('notebook:run-all-cells');
  const outputs = c => c.model.toJSON().outputs;
  const cells = panel.content.widgets.filter(
    c => c.model.type == 'code' && c.model.sharedModel.source.trim());
  const found = cells.flatMap(outputs);
  return {cells: cells.length, run: cells.filter(c => c.model.executionCount).length,
          errors: found.filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue),
          figures: found.filter(o => o.data && o.data['image/png']).length,
          bad: [...document.querySelectorAll('mjx-merror')].map(e => e.textContent)};
})()'''


def is_slow(cell): return bool(re.match(r'#\|\s*(slow|eval:\s*false)', ''.join(cell['source'])))


def wait_for(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition(): return found
        except OSError: pass
        time.sleep(.2)
    raise AssertionError(f'{what} was not there after {seconds} s')


class Tab:
    "A tab of the browser, driven by its DevTools protocol."
    def __init__(self, port):
        from websocket import create_connection  # comes with JupyterLab
        with urlopen(Request(f'http://127.0.0.1:{port}/json/new', method='PUT')) as f:
            address = json.load(f)['webSocketDebuggerUrl']
        self.socket = create_connection(address, suppress_origin=True, timeout=600)
        self.sent = 0

    def __call__(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps(dict(id=self.sent, method=method, params=params)))
        while (said := json.loads(self.socket.recv())).get('id') != self.sent: pass
        assert 'error' not in said, said
        return said['result']

    def js(self, code):
        done = self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in done, done['exceptionDetails']
        return done['result'].get('value')


@pytest.fixture(scope='module')
def lab(tmp_path_factory, files):
    "A tab with JupyterLab on a copy of the project, where slow cells are empty."
    home = tmp_path_factory.mktemp('lab')
    tree, port = copy_project(files, home/'project'), free_port()
    token = secrets.token_hex()
    for name in STORY:
        notebook = json.loads((tree/'nbs'/name).read_text(encoding='utf-8'))
        for cell in notebook['cells']:
            if is_slow(cell): cell['source'] = []
        (tree/'nbs'/name).write_text(json.dumps(notebook), encoding='utf-8')
    news = home/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | {'PYTHONPATH': str(tree)}
    for kind in ('CONFIG', 'DATA', 'RUNTIME'): env[f'JUPYTER_{kind}_DIR'] = str(home/kind.lower())
    for kind in ('WORKSPACES', 'SETTINGS'): env[f'JUPYTERLAB_{kind}_DIR'] = str(home/kind.lower())
    lab = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root',
           f'--ServerApp.port={port}', f'--ServerApp.root_dir={tree/"nbs"}',
           f'--IdentityProvider.token={token}', '--LabApp.expose_app_in_browser=True']
    browser = [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu',
               '--disable-dev-shm-usage', '--remote-debugging-port=0', '--window-size=1280,1600',
               f'--user-data-dir={home/"chromium"}', 'about:blank']
    with (home/'log').open('w') as log:
        started = [subprocess.Popen(command, env=env, stdout=log, stderr=log)
                   for command in (lab, browser)]
        try:
            wait_for('JupyterLab', lambda: urlopen(f'http://127.0.0.1:{port}/api').status == 200)
            seen = home/'chromium'/'DevToolsActivePort'
            wait_for('Chromium', lambda: seen.exists() and seen.read_text().strip())
            tab = Tab(seen.read_text().split()[0])
            tab('Page.enable')
            tab('Page.navigate', url=f'http://127.0.0.1:{port}/lab?token={token}')
            wait_for("JupyterLab's page", lambda: tab.js('!!window.jupyterapp'))
            yield tab
            tab.socket.close()
        finally:
            for process in reversed(started): process.terminate()
            for process in started: process.wait(20)


@pytest.mark.parametrize('name', STORY)
def test_run_all(lab, name, tmp_path):
    done = lab.js(RUN_ALL.replace('NAME', json.dumps(name)))
    (tmp_path/'page.png').write_bytes(base64.b64decode(lab('Page.captureScreenshot')['data']))
    assert not done['errors'] and done['run'] == done['cells'] > 0, done
    stored = json.loads((NBS/name).read_text(encoding='utf-8'))['cells']
    figures = sum('image/png' in o.get('data', ()) for c in stored
                  if c['cell_type'] == 'code' and not is_slow(c) for o in c['outputs'])
    assert done['figures'] == figures, f"{done['figures']} figures; {figures} are stored"
    assert not done['bad'], f"formulas that are not read: {done['bad']}"
