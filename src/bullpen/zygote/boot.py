"""The zygote's main module, run by path in the engine's interpreter: ``python .../bullpen/zygote/boot.py``.

It finds the package by its own place in the file system. ``sys.path`` stays the engine's own, so nothing beside this
package (the daemon's site-packages, say) can shadow a module of the engine. Kept tiny: where the engine spawns a
process, Python runs this file again in it.
"""

import sys

if "bullpen" not in sys.modules:
    import importlib.util
    from pathlib import Path

    _package = Path(__file__).resolve().parents[1]
    if sys.path and Path(sys.path[0]).resolve() == _package / "zygote":
        del sys.path[0]
    _spec = importlib.util.spec_from_file_location(
        "bullpen", _package / "__init__.py", submodule_search_locations=[str(_package)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["bullpen"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["bullpen"])

if __name__ == "__main__":
    from bullpen.zygote.main import main

    raise SystemExit(main())
