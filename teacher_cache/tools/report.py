"""What `plan`, `inspect` and `verify` print for a person; pure functions from numbers to text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shared.format.schema import ROW_CHUNK_BITS
from shared.tasks import TASKS

if TYPE_CHECKING:  # these load torch and transformers
    from teacher_cache.tools.check import Checked
    from teacher_cache.tools.check_states import CheckedStates
    from teacher_cache.tools.check_values import CheckedValues
    from teacher_cache.tools.inspection import Verification


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
    if numbers["generates"]:
        lines.append(
            "            rough: how long the teacher's answers are was seen on few documents, and "
            "writing them takes many forwards more"
            if numbers["calibrated"]
            else "            rough: answers taken to be as long as the corpus' own, or half of "
            "--max-new-tokens; --calibrate lets the teacher write some"
        )
    if numbers["choices"]:
        how = (
            f"measured over {numbers['measured_positions']:,} positions"
            if numbers["calibrated"]
            else "bytes from a table of a strong teacher's; --calibrate measures this one"
        )
        lines.append(f"targets     {how}")
        lines += _choices(numbers["choices"])
    if best := recommendation(numbers):
        lines.append(f"so          {best}")
    each = ", ".join(
        f"{part} {value:.1f}" for part, value in numbers["bytes_per_position"].items() if value
    )
    lines.append(
        f"disk        about {size(numbers['bytes'])} with --targets {numbers['asked']} "
        f"({each} bytes for each position), {size(numbers['free_bytes'])} free"
        + ("" if numbers["enough_space"] else "  NOT ENOUGH (10 % to spare is advised)")
    )
    if numbers["calibrated"]:
        lines.append(
            f"time        about {numbers['hours']:.2f} h at {numbers['tokens_per_s']:,} tokens/s, "
            f"one process; the disk writes {numbers['disk_mb_per_s']:,} MB/s"
        )
    return "\n".join(lines)


CHOICE_NOTES = (
    "bytes: of the target columns, for each position",
    "kept: mean probability of the classes kept as they are",
    "KL: of what is kept, scaled to a sum of 1, to all of it; -ln kept mass, mean",
    "gradient error: of an output head over these positions, relative to the gradient of the whole "
    "distributions; bias: the part that a larger batch does not make smaller, 0 where there is no "
    "sign of one",
)


def choice_table(choices: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and one line for each kind and size, as text; without columns that nothing has."""
    temperatures = list(dict.fromkeys(t for choice in choices for t in choice["kept_mass"]))
    students = list(dict.fromkeys(s for choice in choices for s in choice["gradient_error"]))
    header = ["targets", "bytes"]
    if students:
        header += ["entries", *(f"kept T={t}" for t in temperatures), "KL"]
        for student in students:
            kl = choices[0]["gradient_error"][student]["student_kl"]
            header += [f"error, student at KL {kl:.1f}", "bias"]
    table = [header]
    for choice in choices:
        line = [choice["text"], f"{choice['bytes_per_position']:.1f}"]
        if students:
            masses, kl = choice["kept_mass"], choice["truncation_kl"]
            line.append(f"{choice['entries']:.1f}")
            line += [f"{masses[t]:.1%}" if t in masses else "" for t in temperatures]
            line.append("" if kl is None else f"{kl:.4f}")
            for student in students:
                found = choice["gradient_error"][student]
                line += [f"{found['error']:.4f}", f"{found['bias']:.4f}" if found["bias"] else "0"]
        table.append(line)
    return table


def _choices(choices: Sequence[dict[str, Any]]) -> list[str]:
    table = choice_table(choices)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    marks = ["", *("  <- asked for" if choice["asked"] else "" for choice in choices)]
    lines = []
    for line, mark in zip(table, marks, strict=True):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip() + mark)
    if len(table[0]) > 2:
        lines += [f"  ({note})" for note in CHOICE_NOTES]
    return lines


def recommendation(numbers: dict[str, Any]) -> str:
    """What comes closest to the whole gradient in the room of what was asked for, at the same
    temperatures; "" if nothing was measured."""
    asked = next((choice for choice in numbers["choices"] if choice["asked"]), None)
    if asked is None or not asked["gradient_error"]:
        return ""
    fitting = [
        choice
        for choice in numbers["choices"]
        if choice["bytes_per_position"] <= asked["bytes_per_position"]
        and (choice["kind"] == "dense" or asked["kept_mass"].keys() <= choice["kept_mass"].keys())
    ]
    parts = []
    for student, of_asked in asked["gradient_error"].items():
        best = min(fitting, key=lambda choice: choice["gradient_error"][student]["error"])
        error = best["gradient_error"][student]["error"]
        found = (
            f"itself, {error:.4f}"
            if best is asked
            else f"{best['text']}, {error:.4f} (asked for: {of_asked['error']:.4f})"
        )
        parts.append(f"{found} for a student at KL {of_asked['student_kl']:.1f}")
    return f"least gradient error in at most the bytes of {asked['text']}: " + "; ".join(parts)


def inspect_text(numbers: dict[str, Any]) -> str:
    """The answer of `cache-teacher inspect`."""
    teacher, plan = numbers["teacher"], numbers["plan"]
    corpus = numbers["corpus"]
    state = "complete" if numbers["complete"] else "INCOMPLETE"
    lines = [
        f"cache       {numbers['cache_id'][:16]}  format {numbers['format_version']}  {state}: "
        f"{numbers['shards']} of {numbers['num_shards']} shards",
        f"teacher     {teacher_text(teacher)}",
        f"corpus      {corpus['source']}  {numbers['preprocessing']['split']}  "
        f"{corpus['num_documents']:,} documents, {plan['documents_per_shard']:,} a shard",
        f"task        {task_text(numbers)}",
        f"targets     {targets_text(numbers)}",
        f"size        {size(numbers['bytes'])}: {numbers['rows']:,} rows, {numbers['tokens']:,} "
        f"tokens, {numbers['positions']:,} positions, "
        f"{numbers['bytes_per_position']:.1f} bytes/position",
    ]
    if numbers["counters"]:
        lines.append("counted     " + _counted(numbers["counters"]))
    if numbers["teacher_mse"] is not None:
        lines.append(f"error       mean squared, of the teacher: {numbers['teacher_mse']:.4g}")
    elif numbers["targets"]["kind"] == "values":
        lines.append("error       no hard labels to compare the teacher with")
    elif teacher is not None and numbers["targets"]["kind"] != "none":
        lines += [
            f"kept mass   {kept_text(numbers)}",
            f"entropy     {numbers['entropy']:.3f} nats; {loss_text(numbers)}",
        ]
    lines += [_hidden(layer, numbers) for layer in numbers["hidden"]["layers"]]
    lines.append("bytes for each position, by column:")
    for name, each in numbers["column_bytes_per_position"].items():
        lines.append(f"  {name:<24}{each:8.2f}")
    for row in numbers.get("rows_shown", []):
        lines += _row_text(row)
    return "\n".join(lines)


def loss_text(numbers: dict[str, Any]) -> str:
    """The teacher's loss, where its rows have labels."""
    if numbers["teacher_loss"] is None:
        return "no hard labels"
    return f"loss on the hard labels {numbers['teacher_loss']:.3f} nats"


def teacher_text(teacher: dict[str, Any] | None) -> str:
    if teacher is None:
        return "none (hard labels only)"
    return (
        f"{teacher['id']} @ {teacher['revision']}  {teacher['parameters']:,} parameters, "
        f"{teacher['dtype']}, weights {teacher['weights_digest'][:12]}"
    )


def targets_text(numbers: dict[str, Any]) -> str:
    """Kind, size asked for and found, bits, temperatures."""
    targets = numbers["targets"]
    kind, classes = targets["kind"], f"{targets['num_classes']:,} classes"
    if kind == "none":
        return "none"
    if kind == "values":
        return "values, a float32 for each position"
    stored = ", ".join(["1", *(f"{t:g}" for t in targets["temperatures"])])
    bits = f"{targets['value_bits']} bits"
    if kind == "dense":
        return f"dense, all {classes}, {bits}, exact at any T"
    if kind == "topk":
        return f"topk, {targets['top_k']} of {classes}, {bits}, exact at T = {stored}"
    which = (
        f"every p >= {targets['threshold']:g}"
        if kind == "adaptive"
        else f"every p >= {targets['threshold']:g}, the others drawn with that weight"
    )
    return (
        f"{kind}, {numbers['entries']:.1f} of {classes} ({targets['mean_entries']:g} asked for), "
        f"{which}, {bits}, exact at T = {stored}"
    )


def kept_text(numbers: dict[str, Any]) -> str:
    """The kept mass at each temperature, and of what it is the mass."""
    kept = ", ".join(f"T={t}: {mass:.1%}" for t, mass in numbers["kept_mass"].items())
    if numbers["targets"]["kind"] == "sample":
        return f"{kept} (of the classes kept as they are; all others may be drawn)"
    return kept


def _hidden(layer: int, numbers: dict[str, Any]) -> str:
    spec, error = numbers["hidden"], numbers["hidden_error"].get(str(layer))
    often = "" if spec["every"] == 1 else f" of every position in {spec['every']}"
    off = ""
    if error is not None:
        off = f"; off by {error['mean']:.2%} of its length, {error['worst']:.2%} at worst"
    pooled = "" if spec["pooling"] == "none" else f", one for each row ({spec['pooling']})"
    return f"hidden      layer {layer}: {spec['codec']}{often}{pooled}{off}"


def _counted(counters: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counters.items())


def task_text(numbers: dict[str, Any]) -> str:
    """The task, and what labels are to a row where that may differ."""
    of_rows = TASKS[numbers["task"]].layout == "row"
    return f"{numbers['task']}, {numbers['problem_type']}" if of_rows else str(numbers["task"])


def _window_text(window: dict[str, Any]) -> list[str]:
    answers = " or ".join(map(repr, window["answers"])) or "no answer"
    here = "no answer here" if window["here"] is None else repr(window["here"])
    lines = [
        f"  question {window['question']!r}, answered by {answers}",
        f"  context  {window['context']!r}",
        f"  labels   {here}",
    ]
    if "teacher" in window:
        lines.append(
            f"  teacher  {window['teacher']!r} {window['teacher_p']:.3f}  "
            f"no answer here {window['teacher_p_none']:.3f}"
        )
    return lines


def _row_text(row: dict[str, Any]) -> list[str]:
    if "window" in row:
        head = f"window {row['row_id'] % (1 << ROW_CHUNK_BITS)} of document {row['document']:,}"
        return [f"{head}, {row['tokens']} tokens", *_window_text(row["window"])]
    lines = [f"row of document {row['document']:,}, {row['tokens']} tokens: {row['text']!r}"]
    lines += [f"  {said}" for said in row.get("said", [])]
    if "target" in row:
        lines.append(f"  becomes {row['target']!r}")
    for position in row.get("positions", [])[:4]:
        best = "  ".join(
            f"{entry['token']!r} {entry['p']:.3f}{' (drawn)' if entry['drawn'] else ''}"
            for entry in position["teacher"][:4]
        )
        lines.append(
            f"  {_place(position)}; the teacher says {best}  "
            f"{position['rest']} {position['tail_mass']:.3f}"
        )
    return lines


def _place(position: dict[str, Any]) -> str:
    """Where a position is, and what is right there."""
    label = position["hard_label"]
    if "after" in position:
        return f"after {position['after']!r} comes {label!r}"
    if "of" in position:
        return f"{position['of']!r} in {position['around']!r} is {label or 'not known'}"
    return f"in {position['around']!r} stood {label!r}"


def verify_text(found: "Verification") -> str:
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


def check_text(found: "Checked | CheckedStates | CheckedValues") -> str:
    """The answer of `cache-teacher check`."""
    # Whoever has something to show here has loaded them already.
    from teacher_cache.tools.check_states import CheckedStates
    from teacher_cache.tools.check_values import CheckedValues

    lines = [f"DIFFERS {line}" for line in found.differences]
    if isinstance(found, CheckedStates):
        lines += _state_lines(found)
    elif isinstance(found, CheckedValues):
        lines += _value_lines(found)
    else:
        lines += _kl_lines(found)
    lines.append(
        "the cache says what this teacher says"
        if found.sound
        else "THE CACHE IS OFF: another teacher made it, or its rows and targets do not match"
    )
    return "\n".join(lines)


def _state_lines(found: "CheckedStates") -> list[str]:
    return [
        f"rows                  {found.rows:,} with {found.states:,} states",
        f"error live to live    {found.error_live_live:.3%} of their length (the noise floor)",
        f"error live to cached  {found.error_live_cached:.3%}, worst {found.worst_error:.3%}, "
        f"allowed {found.allowed:.3%}",
    ]


def _value_lines(found: "CheckedValues") -> list[str]:
    unit = "standard deviations of the cached numbers"
    return [
        f"rows                  {found.rows:,} with {found.positions:,} positions",
        f"live to live          {found.distance_live_live:.2e} {unit} (the noise floor)",
        f"live to cached        {found.distance_live_cached:.2e}, worst {found.worst_distance:.2e}",
    ]


def _kl_lines(found: "Checked") -> list[str]:
    return [
        f"rows                  {found.rows:,} with {found.positions:,} positions",
        f"KL live to live       {found.kl_live_live:.2e} nats (the noise floor)",
        f"KL live to cached     {found.kl_live_cached:.2e} nats, worst {found.worst_kl:.2e}",
        f"agreement live/live   {found.agreement_live_live:.2%}",
        f"agreement live/cached {found.agreement_live_cached:.2%}",
    ]


def size(count: float) -> str:
    """Bytes in a unit a person reads: 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
