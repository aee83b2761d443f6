"""``python -m bullpen.zygote``."""

from bullpen.zygote.main import main

if __name__ == "__main__":
    raise SystemExit(main())
