# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def _(on_both_paths: None) -> None:
    """Whatever is shown here is shown of the loops and of the tensor code."""
