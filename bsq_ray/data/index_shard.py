"""Read one WebDataset shard for the index: its samples, their labels, and what else it contains."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from bsq_ray.data.folder_listing import printable
from bsq_ray.data.sample_index import SampleEntry, Shard, index_rows
from bsq_ray.data.sample_labels import (
    JSON_SUFFIX,
    LABEL_FIELDS,
    LARGE_LABELS,
    MAX_LABEL_BYTES,
    TEXT_LABEL_SUFFIXES,
    SampleLabel,
    parse_json_label,
    parse_label,
)
from bsq_ray.data.shard_content import ShardContent
from bsq_ray.data.shard_reader import check_shard
from bsq_ray.data.tar_members import KeyUntil, Member, describe_wrong_tar, iter_members, split_member_name
from bsq_ray.media.decode_error import DecodeError
from bsq_ray.media.images import IMAGE_SUFFIXES
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, VideoInfo, probe

_SAMPLE_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
# Formats of masks that accompany an image of the same key.
MASK_SUFFIXES = (".pgm", ".pbm", ".ppm", ".pnm")


@dataclass(frozen=True)
class IndexOptions:
    """Options of `index_shards`.

    Attributes:
        key_until: end of a member's key: the first or the last dot of its base name.
        label_field: field of the JSON files that contains the label, with dots between levels; None looks for the usual
            names.
        class_list: text file with a class per line; None takes the classes from the labels.
        num_workers: number of parallel Ray tasks; 0 indexes in this process, None uses all CPUs of the cluster.
        address: address of a Ray cluster; None starts Ray on this node.
        storage_timeout_s: seconds to retry unavailable storage before indexing fails.
    """

    key_until: KeyUntil = "first-dot"
    label_field: str | None = None
    class_list: str | None = None
    num_workers: int | None = 0
    address: str | None = None
    storage_timeout_s: float = 600.0


@dataclass
class IndexedShard:
    """A shard, the labels of its samples, and counts of its members.

    Attributes:
        shard: manifest entry, without digest; its labels are not numbered yet.
        labels: label of each sample; None for samples without one.
        json_fields: fields from which labels were read, each with a member.
        num_members, num_used, unused, examples: as in `IndexReport`.
    """

    shard: Shard
    labels: list[SampleLabel | None]
    json_fields: dict[str, str] = field(default_factory=dict)
    num_members: int = 0
    num_used: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, member: Member, reason: str, detail: str = "") -> None:
        """Count a member that is not used."""
        self.unused[reason] += 1
        self.examples.setdefault(reason, f"{self.shard.name}: {member.name}{detail}")


def index_shard(name: str, content: ShardContent, url: str, options: IndexOptions) -> IndexedShard:
    """Return the manifest entry of a shard, the labels of its samples, and counts of its members.

    Args:
        name, content, url: file name, content and URL of the shard.
        options: see `IndexOptions`.

    Raises:
        ValueError: the shard is damaged, it has neither images nor videos that can be read, or a label is not one.
    """
    result = IndexedShard(Shard(name, content.num_bytes, "", index_rows([])), [])
    samples: dict[str, tuple[Member, str]] = {}
    label_members: dict[str, dict[str, Member]] = {}
    try:
        members = list(iter_members(content))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{url} {describe_wrong_tar(content, name) or f'is damaged: {error}'}") from error
    for member in members:
        parts = split_member_name(member.name, options.key_until)
        if member.reason:
            result.leave_out(member, member.reason)
        elif parts is None:
            result.leave_out(member, "files without a suffix, or with a name that starts with a dot")
        elif parts[1] in (*TEXT_LABEL_SUFFIXES, JSON_SUFFIX):
            by_suffix = label_members.setdefault(parts[0], {})
            if parts[1] in by_suffix:
                result.leave_out(member, "labels whose key occurs earlier in the shard")
            else:
                by_suffix[parts[1]] = member
        elif not parts[1].endswith(_SAMPLE_SUFFIXES):
            result.leave_out(member, f"{printable(parts[1])} files")
        elif parts[1] not in _SAMPLE_SUFFIXES:
            detail = f" (key {parts[0]}, suffix {parts[1]}); index with --key-until last-dot to use such names"
            result.leave_out(member, "files whose key ends at the first dot of the name", detail)
        elif not member.size:
            result.leave_out(member, "empty images or videos")
        elif parts[0] in samples:
            earlier, earlier_suffix = samples[parts[0]]
            if earlier_suffix in MASK_SUFFIXES and parts[1] not in MASK_SUFFIXES:
                samples[parts[0]], member = (member, parts[1]), earlier
            result.leave_out(member, "images or videos whose key another one in the shard has")
        else:
            samples[parts[0]] = (member, parts[1])
    result.num_members = len(members)
    videos = _probe_videos(result, samples, label_members, content, url)
    if not samples:
        unused = "; ".join(
            f"{count} {reason}, such as {result.examples[reason]}" for reason, count in result.unused.items()
        )
        raise ValueError(
            f"{url} contains no images ({', '.join(IMAGE_SUFFIXES)}) and no videos ({', '.join(VIDEO_SUFFIXES)})"
            + (f"; it has {unused}" if unused else "")
        )
    _read_labels(result, samples, label_members, content, options)
    entries = [SampleEntry(key, 0, member.offset, member.size) for key, (member, _) in samples.items()]
    result.shard = replace(result.shard, rows=index_rows(entries, videos or None))
    result.num_used += len(entries)
    check_shard(result.shard, content, url)
    return result


def _read_labels(
    result: IndexedShard,
    samples: Iterable[str],
    label_members: dict[str, dict[str, Member]],
    content: ShardContent,
    options: IndexOptions,
) -> None:
    """Read the label of each sample from the first of its label files, and count those that are not used."""
    order = (JSON_SUFFIX, *TEXT_LABEL_SUFFIXES) if options.label_field else (*TEXT_LABEL_SUFFIXES, JSON_SUFFIX)
    for key in samples:
        label = None
        by_suffix = label_members.pop(key, {})
        for suffix in sorted(by_suffix, key=order.index):
            member = by_suffix[suffix]
            if label is not None:
                result.leave_out(member, f"{suffix} files of samples with another label")
                continue
            if member.size > MAX_LABEL_BYTES:
                result.leave_out(member, LARGE_LABELS)
                continue
            data, where = content.read(member.offset, member.size), f"{result.shard.name}: {member.name}"
            if suffix != JSON_SUFFIX:
                label = parse_label(data, where)
            elif (json_label := parse_json_label(data, where, options.label_field)) is not None:
                label, json_field = json_label
                result.json_fields.setdefault(json_field, where)
            else:
                fields = ", ".join(LABEL_FIELDS[:4])
                result.leave_out(member, f".json files without a label field ({fields}, …; choose with --label-field)")
                continue
            result.num_used += 1
        result.labels.append(label)
    for by_suffix in label_members.values():
        for member in by_suffix.values():
            result.leave_out(member, "labels without an image or video of their key")


def _probe_videos(
    result: IndexedShard,
    samples: dict[str, tuple[Member, str]],
    label_members: dict[str, dict[str, Member]],
    content: ShardContent,
    url: str,
) -> list[VideoInfo]:
    """Return the facts about each video, none if the samples are images; leave out videos that cannot be read."""
    suffixes = {suffix for _, suffix in samples.values()}
    if suffixes.isdisjoint(VIDEO_SUFFIXES):
        return []
    if not suffixes.isdisjoint(IMAGE_SUFFIXES):
        raise ValueError(f"{url} contains images and videos ({', '.join(sorted(suffixes))}); a data set has one kind")
    videos = []
    for key, (member, _) in list(samples.items()):
        try:
            videos.append(probe(io.BytesIO(content.read(member.offset, member.size))).video)
        except DecodeError as error:
            del samples[key]
            result.leave_out(member, "videos that cannot be read", f" ({error})")
            for label_member in label_members.pop(key, {}).values():
                result.leave_out(label_member, "labels of videos that cannot be read")
    return videos
