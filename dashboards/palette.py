"""The same thing has the same colour on every page, dark and light, also to colour-blind eyes."""

COMPUTED = "#E27A12"
KV = "#139A82"
REUSED = KV
HEALTHY = KV
DECODE = "#B07AE0"
IDLE = "rgba(128,138,155,0.28)"
WARNING = "#D39E0C"
BAD = "#E5533D"
NEUTRAL = "#8A93A6"
HOST = "#3D8BE0"
TEXT = "text"
TRANSPARENT = "transparent"

# A stack of slots: shades of the KV cache's colour, dark and light far enough apart.
SLOTS = ("#0B6B5A", "#139A82", "#52C4AC", "#A5E3D5")

# Lines of slots need to be told apart one by one: light and dark in turn.
LINES = ("#9FC8F8", "#EBCB6B", "#8F7AC8", "#6FB7A4", "#F7B3C6", "#B97F4E", "#C9D1DB", "#8C9A45")

GPUS = ("#7F8CA3", "#B08968")

PHASES = {"idle": IDLE, "prefill": COMPUTED, "decode": DECODE}

STATES = {
    "ready": HEALTHY,
    "loading": WARNING,
    "sleeping": HOST,
    "stalled": WARNING,
    "slots_disabled": WARNING,
    "unauthorized": BAD,
    "not_llama_server": BAD,
    "unreachable": BAD,
}

REASONS = {
    "takeover": "#D9A92B",
    "diverged": "#B5713A",
    "idle_clear": "#6FB7A4",
    "context_shift": "#E0457B",
    "erase": "#C9D1DB",
    "sleep": "#8F7AC8",
    "restart": BAD,
    "unknown": NEUTRAL,
}

THROTTLED = {"power": WARNING, "thermal": BAD, "other": NEUTRAL}

VRAM = {
    "weights": ("weights", "#5D6FB8"),
    "kv": ("KV cache", KV),
    "compute": ("compute", "#B59A32"),
    "server_rest": ("rest", NEUTRAL),
    "server_unsplit": ("server", "#7D8BC9"),
    "other_processes": ("others", "#F58AB0"),
    "unattributed": ("unreadable", "#C9D1DB"),
    "reserved": ("reserved", "#5F6878"),
    "free": ("free", IDLE),
}
"""Who holds the VRAM, from the bottom of a stack to its top: what it is called there, and its colour."""
