"""Data sets of any size from one packed shard: links to its tar and its index under many names."""

from pathlib import Path

from bsq_ray.data.manifest import read_manifest, write_manifest
from bsq_ray.data.sample_index import ShardRow


def link_shards(url, folder, num_shards):
    """Return the manifest of `num_shards` links to the first shard of the data set at `url`."""
    manifest = read_manifest(url)
    row, source, folder = manifest.shard_row(0), Path(url), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_shards):
        name = f"shard-{number:06d}"
        for suffix in (".tar", ".arrow"):
            (folder / (name + suffix)).symlink_to(source / row.name.replace(".tar", suffix))
        rows.append(ShardRow(f"{name}.tar", row.bytes, row.digest, row.num_samples, row.index_bytes))
    return write_manifest(str(folder), rows, manifest.classes, manifest.kind, has_content_digests=True)
