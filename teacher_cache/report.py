"""What `plan`, `inspect` and `verify` print for a person; pure functions from numbers to text."""

from typing import Any

from teacher_cache.check import Checked
from teacher_cache.inspection import Verification


def estimate_text(numbers: dict[str, Any]) -> str:
    """The answer of `cache-teacher plan`."""
    about = "" if numbers["sampled_documents"] == numbers["documents"] else "about "
    lines = [
        f"documents   {numbers['documents']:,} ({numbers['sampled_documents']:,} looked at)",
        f"rows        {about}{numbers['rows']:,}",
        f"tokens      {about}{numbers['tokens']:,}",
        f"positions   {about}{numbers['positions']:,}",
        f"shards      {numbers['shards']:,} of {numbers['documents_per_shard']:,} documents",
        f"classes     {numbers['classes']:,}",
    ]
    if numbers["target_bytes_per_position"]:
        how = "measured on a sample" if numbers["calibrated"] else "from a table, a strong teacher"
        lines.append(f"bytes of targets for each position ({how}):")
        lines += _by_k(numbers)
    lines.append(
        f"disk        about {size(numbers['bytes'])} at --top-k {numbers['top_k']}, "
        f"{size(numbers['free_bytes'])} free"
        + ("" if numbers["enough_space"] else "  NOT ENOUGH (10 % to spare is advised)")
    )
    if numbers["calibrated"]:
        lines.append(
            f"time        about {numbers['hours']:.2f} h at {numbers['tokens_per_s']:,} tokens/s, "
            f"one process; the disk writes {numbers['disk_mb_per_s']:,} MB/s"
        )
    return "\n".join(lines)


def _by_k(numbers: dict[str, Any]) -> list[str]:
    masses = numbers.get("kept_mass", {})
    header = "      k   bytes" + "".join(f"  kept at T={t}" for t in masses)
    lines = [header]
    for k, bytes_each in numbers["target_bytes_per_position"].items():
        kept = "".join(f"  {by_k[k]:>11.1%}" for by_k in masses.values())
        mark = "  <- --top-k" if int(k) == numbers["top_k"] else ""
        lines.append(f"  {k:>5} {bytes_each:>7.1f}{kept}{mark}")
    return lines


def inspect_text(numbers: dict[str, Any]) -> str:
    """The answer of `cache-teacher inspect`."""
    teacher, plan = numbers["teacher"], numbers["plan"]
    targets, corpus = numbers["targets"], numbers["corpus"]
    state = "complete" if numbers["complete"] else "INCOMPLETE"
    lines = [
        f"cache       {numbers['cache_id'][:16]}  format {numbers['format_version']}  {state}: "
        f"{numbers['shards']} of {numbers['num_shards']} shards",
        f"teacher     {_teacher(teacher)}",
        f"corpus      {corpus['source']}  {numbers['preprocessing']['split']}  "
        f"{corpus['num_documents']:,} documents, {plan['documents_per_shard']:,} a shard",
        f"task        {numbers['task']}",
        f"targets     {_targets(targets)}",
        f"size        {size(numbers['bytes'])}: {numbers['rows']:,} rows, {numbers['tokens']:,} "
        f"tokens, {numbers['positions']:,} positions, "
        f"{numbers['bytes_per_position']:.1f} bytes/position",
    ]
    if numbers["counters"]:
        lines.append("counted     " + _counted(numbers["counters"]))
    if teacher is not None:
        kept = ", ".join(f"T={t}: {mass:.1%}" for t, mass in numbers["kept_mass"].items())
        lines += [
            f"kept mass   {kept}",
            f"entropy     {numbers['entropy']:.3f} nats; loss on the hard labels "
            f"{numbers['teacher_loss']:.3f} nats",
        ]
    lines += [_hidden(layer, numbers) for layer in numbers["hidden"]["layers"]]
    lines.append("bytes for each position, by column:")
    for name, each in numbers["column_bytes_per_position"].items():
        lines.append(f"  {name:<24}{each:8.2f}")
    for row in numbers.get("rows_shown", []):
        lines += _row_text(row)
    return "\n".join(lines)


def _teacher(teacher: dict[str, Any] | None) -> str:
    if teacher is None:
        return "none (hard labels only)"
    return (
        f"{teacher['id']} @ {teacher['revision']}  {teacher['parameters']:,} parameters, "
        f"{teacher['dtype']}, weights {teacher['weights_digest'][:12]}"
    )


def _targets(targets: dict[str, Any]) -> str:
    if targets["kind"] == "none":
        return "none"
    stored = ", ".join(["1", *(f"{t:g}" for t in targets["temperatures"])])
    return (
        f"{targets['kind']}, {targets['top_k']} of {targets['num_classes']:,} classes, "
        f"{targets['value_bits']} bits, exact at T = {stored}"
    )


def _hidden(layer: int, numbers: dict[str, Any]) -> str:
    spec, error = numbers["hidden"], numbers["hidden_error"].get(str(layer))
    often = "" if spec["every"] == 1 else f" of every position in {spec['every']}"
    off = ""
    if error is not None:
        off = f"; off by {error['mean']:.2%} of its length, {error['worst']:.2%} at worst"
    return f"hidden      layer {layer}: {spec['codec']}{often}{off}"


def _counted(counters: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counters.items())


def _row_text(row: dict[str, Any]) -> list[str]:
    lines = [f"row of document {row['document']:,}, {row['tokens']} tokens: {row['text']!r}"]
    for position in row.get("positions", []):
        best = "  ".join(f"{token!r} {p:.3f}" for token, p in position["teacher"].items())
        lines.append(
            f"  after {position['after']!r} comes {position['hard_label']!r}; the teacher says "
            f"{best}  tail {position['tail_mass']:.3f}"
        )
    return lines


def verify_text(found: Verification) -> str:
    """The answer of `cache-teacher verify`."""
    lines = [f"BAD shard {shard}: {reason}" for shard, reason in found.bad.items()]
    if found.dropped:
        lines.append(
            f"dropped the commits of {len(found.dropped)} shards; run cache-teacher run again"
        )
    state = "sound" if found.sound else f"{len(found.bad)} BAD"
    lines.append(
        f"{found.shards} of {found.num_shards} shards committed and read, {size(found.bytes)}"
        f"{', sealed' if found.sealed else ''}: "
        f"{state}"
    )
    return "\n".join(lines)


def check_text(found: Checked) -> str:
    """The answer of `cache-teacher check`."""
    lines = [f"DIFFERS {line}" for line in found.differences]
    lines += [
        f"rows                  {found.rows:,} with {found.positions:,} positions",
        f"KL live to live       {found.kl_live_live:.2e} nats (the noise floor)",
        f"KL live to cached     {found.kl_live_cached:.2e} nats, worst {found.worst_kl:.2e}",
        f"agreement live/live   {found.agreement_live_live:.2%}",
        f"agreement live/cached {found.agreement_live_cached:.2%}",
        "the cache says what this teacher says"
        if found.sound
        else "THE CACHE IS OFF: another teacher made it, or its rows and targets do not match",
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in a unit a person reads: 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
