# SPDX-License-Identifier: Apache-2.0
"""Thread settings: what vLLM does well is left alone, what the user set too."""

from __future__ import annotations

import pytest

from vllm_spec_plugins.cpu.threads import advice, chosen


def test_one_worker_per_node_is_left_to_vllms_binding() -> None:
    assert chosen({}, workers=1, nodes=1, cores=8) == {}
    assert chosen({}, workers=2, nodes=2, cores=64) == {}


def test_more_workers_than_nodes_share_the_cores_unbound() -> None:
    assert chosen({}, workers=2, nodes=1, cores=8) == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


@pytest.mark.parametrize("cores", [1, 2])
def test_every_worker_gets_a_thread(cores: int) -> None:
    assert chosen({}, workers=4, nodes=1, cores=cores)["OMP_NUM_THREADS"] == "1"


def test_an_unbound_worker_gets_a_number_of_threads() -> None:
    found = chosen({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, workers=1, nodes=1, cores=8)
    assert found == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "PASSIVE"}


def test_what_the_user_set_stays() -> None:
    given = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    assert chosen(given, workers=2, nodes=1, cores=8) == {}
    assert chosen({"VLLM_CPU_OMP_THREADS_BIND": "0-3|4-7"}, workers=2, nodes=1, cores=8) == {}


def test_an_engine_in_this_process_gets_advice_only_where_threads_spin() -> None:
    assert "OMP_WAIT_POLICY=PASSIVE" in (advice({}, in_this_process=True, threads=4) or "")
    assert advice({}, in_this_process=False, threads=4) is None
    assert advice({}, in_this_process=True, threads=1) is None
    assert advice({"OMP_WAIT_POLICY": "PASSIVE"}, in_this_process=True, threads=4) is None
