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


@pytest.mark.parametrize("what", [[], ["rooter"]])
def test_what_cannot_be_tuned_is_told(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", *what])
    assert "valid is router" in capsys.readouterr().err
