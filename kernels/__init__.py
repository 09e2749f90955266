# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one per file, without any knowledge of vLLM. Always imported as `vllm_spec_plugins.kernels`.

This folder lies in the repository's root. With the root on `sys.path` (`python -m pytest`, `python -c`, PYTHONPATH) it
is also what `import kernels` finds, and transformers looks for a package of that name: for a spec first, then for a
version among the installed distributions, and failing that in `__version__` of the package, which it imports. Hence:

* Nothing is imported here and there is no `__version__`: transformers then takes the package for absent, at no cost.
* Where the real `kernels` distribution is installed, transformers finds that one's version, goes on to import names
  from this folder, and fails. So under the name `kernels` this package steps aside for the one that it hides.

Leaving this file out would do both (a folder without it never hides a package), but an editable installation cannot
map such a folder to `vllm_spec_plugins.kernels`.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _entries = [Path(entry).resolve() for entry in sys.path]
    _behind = sys.path[_entries.index(_root) + 1 :] if _root in _entries else []
    _hidden = PathFinder.find_spec(__name__, [entry for entry in _behind if Path(entry).resolve() != _root])
    if _hidden is not None and _hidden.loader is not None:
        # The import system hands out whatever stands in sys.modules when this file has run.
        sys.modules[__name__] = module_from_spec(_hidden)
        _hidden.loader.exec_module(sys.modules[__name__])
