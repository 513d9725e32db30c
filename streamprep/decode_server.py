"""Imported by the fork server of decoding processes, and by nothing else: it ignores SIGTERM from then on.

Slurm sends it to every process of a step. A rank that finishes its unit before it leaves still needs the server, which
ends with the rank anyhow.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
