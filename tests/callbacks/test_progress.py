import io
import re
from pathlib import Path

import pytest
from rich import reconfigure
from toy import ToyLoader, ToyModule, toy_trainer

from callbacks import Progress, Throughput


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [Throughput(every_n_steps=2), Progress(every_n_steps=2)]
    trainer = toy_trainer(tmp_path, callbacks, max_steps=5, enable_progress_bar=True, val_check_interval=2)
    trainer.fit(ToyModule(), ToyLoader(), ToyLoader(1))
    trainer.test(ToyModule(), ToyLoader(1), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert all(re.fullmatch(r"step \d/5  loss [\d.]+  samples/s [\d.e+]+  0:00:0\d", line) for line in lines)
    assert not any("\x1b" in line or "v_num" in line for line in lines)


def test_a_terminal_gets_the_bar_with_loss_and_speed(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = Progress(plain=False)
    progress._console_kwargs = {"file": screen, "force_terminal": True, "width": 160}
    callbacks = [Throughput(every_n_steps=2), progress]
    try:
        toy_trainer(tmp_path, callbacks, max_steps=4, enable_progress_bar=True).fit(ToyModule(), ToyLoader())
    finally:
        reconfigure()
    text = screen.getvalue()
    assert "loss: " in text and "samples/s: " in text and "v_num" not in text


def test_lines_only_every_n_steps_under_accumulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = toy_trainer(
        tmp_path, [Progress(every_n_steps=2, plain=True)], 4, enable_progress_bar=True, accumulate_grad_batches=3
    )
    trainer.fit(ToyModule(), ToyLoader())
    assert capsys.readouterr().out.count("step ") == 2
