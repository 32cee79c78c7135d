"""`kdlib.trainer.distributed`: two processes train what one does, and fail as one."""

import json
import os
import subprocess
import sys
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
from kdlib.trainer.distributed import distributed, gathered, joined, synchronised, wait

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
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
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
    """Where the same training was done by one process, and by two of them twice at once."""
    made = tmp_path_factory.mktemp("world")
    (made / "worker_of_world.py").write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{made}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        subprocess.run([sys.executable, "-m", "worker_of_world", str(made)], check=True)
        twins = [made / "a", made / "b"]
        failed: list[BaseException] = []

        def run(twin: Path) -> None:
            twin.mkdir()
            try:
                launch(["worker_of_world", str(twin)], 2)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(twin,)) for twin in twins]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        yield made


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


def test_two_launches_at_once_do_not_meet(folder):
    assert read(folder / "a" / "2-0.json") == read(folder / "b" / "2-0.json")


def test_a_process_that_fails_ends_all_of_them(folder, capfd):
    with pytest.raises(RuntimeError, match=r"2 processes of `python -m worker_of_world .*status 1"):
        launch(["worker_of_world", str(folder), "fail"], 2)
    assert "of this process alone" in capfd.readouterr().err


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
