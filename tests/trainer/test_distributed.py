"""`kdlib.trainer.distributed`: two processes train what one does, and fail as one."""

import json
import os
import re
import runpy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from kdlib.trainer.distributed import (
    SyncedBatchNorm,
    World,
    distributed,
    gathered,
    joined,
    launch,
    synchronised,
    wait,
)

SCRIPT = """
import json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from kdlib.study.training import Training
from kdlib.trainer.distributed import distributed, gathered, joined, synchronised, wait
from kdlib.trainer.optimiser import make_optimiser

folder = Path(sys.argv[1])
torch.set_num_threads(1)

class BatchNormAct(nn.BatchNorm2d):  # as timm's BatchNormAct2d
    def forward(self, x):
        return self.act(self.drop(super().forward(x)))

if len(sys.argv) > 2:
    with joined("cpu") as r:
        if r.rank == 1:
            raise ValueError("of this process alone")
        wait(r)
torch.manual_seed(0)
x, y = torch.randn(6, 8, 2, 5, 5), torch.arange(48).reshape(6, 8) % 3
body = nn.Sequential(
    nn.Conv2d(2, 4, 3), BatchNormAct(4, momentum=None), nn.ReLU(), nn.Flatten(),
    nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, 3),
)
body[1].drop, body[1].act = nn.Identity(), nn.Hardtanh(0, 1)
with joined("cpu") as r:
    module = synchronised(body, r)
    call = distributed(module, r)
    optimiser = make_optimiser(
        module.parameters(), Training(steps=6, batch_size=8, lr_peak=0.1, weight_decay=0)
    )
    losses = []
    for step in range(6):
        share = slice(r.rank * 8 // r.size, (r.rank + 1) * 8 // r.size)
        out = gathered(call(x[step][share]), r)
        labels = gathered(y[step][share], r)
        # the second part relates every example to every other
        loss = F.cross_entropy(out, labels) + (out @ out.T - torch.eye(8)).square().mean()
        optimiser.zero_grad()
        (loss * r.size).backward()
        optimiser.step()
        losses.append(loss.item())
        assert labels.tolist() == y[step].tolist()
    module.eval()
    found = {k: v.flatten().tolist() for k, v in module.state_dict().items()}
    shown = gathered(module(x[0][share]).detach().bfloat16(), r).float().tolist()
    (folder / f"{r.size}-{r.rank}.json").write_text(json.dumps([losses, found, shown]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the same training was done by one process, and by two of them (`a`) beside two others
    that fail (`failed.txt`: their error, and what was printed)."""
    made = tmp_path_factory.mktemp("world")
    (made / "worker_of_world.py").write_text(SCRIPT)
    (made / "a").mkdir()
    errors: list[BaseException] = []

    def run(*arguments: str) -> None:
        try:
            launch(["worker_of_world", *arguments], 2)
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch, open(made / "failed.txt", "w+") as file:
        patch.setenv("PYTHONPATH", f"{made}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setattr("sys.argv", ["worker_of_world", str(made)])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(made / "worker_of_world.py"))
        threads = [
            threading.Thread(target=run, args=arguments)
            for arguments in ((str(made / "a"),), (str(made), "fail"))
        ]
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.write("\n".join(map(str, errors)))
    return made


def read(path: Path) -> tuple:
    return tuple(json.loads(path.read_text()))


def test_two_processes_train_what_one_does(folder):
    one = read(folder / "1-0.json")
    for rank in (0, 1):
        losses, state, shown = read(folder / "a" / f"2-{rank}.json")
        assert losses == pytest.approx(one[0], rel=1e-5)
        assert state.keys() == one[1].keys()
        for name, values in state.items():
            assert values == pytest.approx(one[1][name], rel=1e-4, abs=1e-5), name
        assert torch.allclose(torch.tensor(shown), torch.tensor(one[2]), atol=0.05)


def test_the_processes_agree_to_the_bit(folder):
    assert read(folder / "a" / "2-0.json") == read(folder / "a" / "2-1.json")


def test_a_process_that_fails_ends_all_of_its_launch_and_none_of_another_at_the_same_time(folder):
    told = (folder / "failed.txt").read_text()
    assert "of this process alone" in told
    last = told.splitlines()[-1]
    assert re.match(r"2 processes of `python -m worker_of_world .* fail` ended with status 1", last)
    assert not (folder / "2-0.json").exists()


def test_alone_nothing_changes_and_nothing_is_joined():
    network, rows = nn.BatchNorm1d(2), torch.randn(3, 2, requires_grad=True)
    with joined("cpu") as one:
        assert one == World(device="cpu")
        assert one.first
        assert one.alone
        assert synchronised(network, one) is network
        assert type(network) is nn.BatchNorm1d
        assert distributed(network, one) is network
        assert gathered(rows, one) is rows
        wait(one)
    assert not torch.distributed.is_initialized()


def test_batchnorm_keeps_its_names_and_parameters_when_synchronised():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    before = {k: v.data_ptr() for k, v in network.state_dict().items()}
    synchronised(network, World(0, 2))
    assert {k: v.data_ptr() for k, v in network.state_dict().items()} == before
    assert isinstance(network[1], SyncedBatchNorm)
