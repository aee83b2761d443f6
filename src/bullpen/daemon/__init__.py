"""The daemon as a process: its ports, its faces side by side, its start and its end."""
