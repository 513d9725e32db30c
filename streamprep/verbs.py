"""What each verb does and prints: results on stdout, everything else on stderr."""

from __future__ import annotations

from streamprep.config import PackConfig
from streamprep.pack import pack as pack_dataset
from streamprep.progress import count, size


def pack(config: PackConfig) -> int:
    """Pack and print the totals."""
    manifest = pack_dataset(config)
    print(
        f"{count(manifest.num_samples, 'video')}, {count(len(manifest.shards), 'shard')}, "
        f"{size(manifest.size_bytes)} in {config.shards}"
    )
    return 0
