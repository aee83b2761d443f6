"""The zygote's main module, run by path in the engine's interpreter: ``python .../bullpen/zygote/boot.py``.

It finds the package by its own place in the file system. ``sys.path`` stays the engine's own, so nothing beside this
package (the daemon's site-packages, say) can shadow a module of the engine. Kept tiny: where the engine spawns a
process, Python runs this file again in it.
"""

import os
import sys

if "bullpen" not in sys.modules:
    _folder = os.path.dirname(os.path.realpath(__file__))
    # Before anything else is imported: no module beside this file may stand in for one of the same name.
    if sys.path and os.path.realpath(sys.path[0]) == _folder:
        del sys.path[0]
    import importlib.util

    _package = os.path.dirname(_folder)
    _spec = importlib.util.spec_from_file_location(
        "bullpen", os.path.join(_package, "__init__.py"), submodule_search_locations=[_package]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["bullpen"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["bullpen"])

if __name__ == "__main__":
    from bullpen.zygote.main import main

    raise SystemExit(main())
