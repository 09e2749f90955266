# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tools.router.fakes import settings
from vllm_spec_plugins.tools import cli
from vllm_spec_plugins.tools.router import cli as router


def test_a_wrong_configuration_ends_the_start_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cascade.yaml"
    file.write_text(json.dumps({**settings().model_dump(exclude_none=True), "threshold": 7}))
    with pytest.raises(SystemExit) as left:
        cli.main(["router", "--config", str(file)])
    assert left.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"vllm-spec router: error: {file}: threshold=7: ")


def test_it_listens_on_this_machine_alone_unless_told_and_warns_where_everybody_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **how: served.append(how))
    monkeypatch.setenv("CLIENTS", "a=k")
    for keys, warned in ((None, True), ("CLIENTS", False)):
        caplog.clear()
        file = tmp_path / "cascade.yaml"
        file.write_text(json.dumps(settings(client_keys_env=keys).model_dump(exclude_none=True)))
        assert router.main(["--config", str(file), "--port", "9"]) == 0
        assert (served[-1]["host"], served[-1]["port"]) == ("127.0.0.1", 9)
        assert ("whoever reaches this port" in caplog.text) is warned


def test_a_router_is_tuned_by_the_tune_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    assert cli.main(["tune", "router", "--record", str(absent), "--output", str(tmp_path / "m")]) == 1
    assert "No such file" in capsys.readouterr().out
