from dataclasses import dataclass
from enum import StrEnum
class CrashClass(StrEnum):
    ERROR="error"; UNKNOWN="unknown"; START_TIMEOUT="start_timeout"; STUCK="stuck"
@dataclass(frozen=True)
class Failure:
    kind: CrashClass
    message: str
def classify(exit_code, log_tail, *, model=None, port=None, memory_limit_hit=False):
    return None if exit_code==0 else Failure(CrashClass.ERROR, "x")
