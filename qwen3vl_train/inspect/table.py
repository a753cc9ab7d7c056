"""Print the facts as tables for the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen3vl_train.inspect.facts import Facts, Finding, Histogram, PackFacts, SourceFacts

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_MOST_REASONS = 5


def print_facts(facts: Facts, console: Console) -> None:
    """Print sources, rejects, packs and findings."""
    model = facts.model
    console.print(
        f"[bold]{escape(facts.recipe)}[/]: {escape(str(model['path']))}, {model['template']} template, "
        f"{model['min_visual_tokens_per_image']:,} to {model['max_visual_tokens_per_image']:,} visual tokens an image"
    )
    console.print(_rows_table(facts.sources))
    console.print(_distributions_table(facts.sources))
    for source in facts.sources:
        for group in source.rejects[:_MOST_REASONS]:
            where = escape(f"{source.name}:{group.rows[0]}: {group.reason}")
            count = f"{group.count:,} of {source.rows:,} rows rejected"
            console.print(f"[red]{count}[/] ({group.kind}) {where}", soft_wrap=True)
        if len(source.rejects) > _MOST_REASONS:
            console.print(f"and for {len(source.rejects) - _MOST_REASONS} more reasons")
        if source.ignored:
            names = ", ".join(f"{name} {count:,}" for name, count in source.ignored.items())
            console.print(f"[dim]ignored[/] {escape(f'{source.name}: {names}')}", soft_wrap=True)
    console.print(_packs_line(facts.packs), soft_wrap=True)
    for finding in facts.findings:
        console.print(_line(finding), soft_wrap=True)
    if not facts.findings:
        console.print("[green]nothing looks wrong[/]")


def _packs_line(packs: PackFacts) -> str:
    if not packs.packs:
        return "no packs: no training row can be used"
    fill = f"{100 * packs.mean_fill:.1f}% of {packs.max_tokens_per_pack:,} tokens filled"
    if packs.steps_per_epoch is None:
        return f"{packs.packs:,} packs of the first rows of the streams, {fill}; {packs.num_steps:,} steps in the run"
    return (
        f"{packs.packs:,} {'pack' if packs.packs == 1 else 'packs'} an epoch, {fill}; {packs.steps_per_epoch:,} "
        f"{'step' if packs.steps_per_epoch == 1 else 'steps'} an epoch, {packs.num_steps:,} in the run"
    )


def _rows_table(sources: list[SourceFacts]) -> Table:
    """Return one line for each source, without the columns that are 0 for all."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("source", overflow="fold", min_width=12)
    table.add_column("format", overflow="fold")
    counts = {
        "rows": [source.rows for source in sources],
        "rejected": [source.rejected for source in sources],
        "dropped": [source.dropped for source in sources],
        "no label": [source.num_nothing_to_learn for source in sources],
        "repeats": [source.duplicates.count for source in sources],
        "images": [source.images for source in sources],
        "videos": [source.videos for source in sources],
    }
    counts = {name: column for name, column in counts.items() if name == "rows" or any(column)}
    for heading in (*counts, "trained"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, source in enumerate(sources):
        trained = source.label_tokens / source.examined_tokens if source.examined_tokens else 0.0
        table.add_row(
            escape(source.name + (" (held out)" if source.role == "eval" else "")),
            " ".join(source.formats),
            *(f"{column[number]:,}" for column in counts.values()),
            f"{100 * trained:.1f}%",
        )
    return table


def _distributions_table(sources: list[SourceFacts]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="median/95th percentile/maximum", caption_justify="left"
    )
    table.add_column("source", overflow="fold")
    columns = {"text_tokens": "text tokens", "visual_tokens": "visual tokens", "images": "images", "turns": "answers"}
    for heading in (*columns.values(), "wide : high"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in sources:
        cells = (_distribution(source.histograms[name]) for name in columns)
        table.add_row(escape(source.name), *cells, _distribution(source.histograms["aspect_ratios"], digits=1))
    return table


def _distribution(values: Histogram, digits: int = 0) -> str:
    if not values.counts:
        return "none"
    return "/".join(f"{value:,.{digits}f}" for value in (values.median, values.p95, values.maximum))


def _line(finding: Finding) -> str:
    where = f"{escape(finding.source)}: " if finding.source else ""
    text = f"{escape(finding.message)} {escape(finding.evidence)}. [bold]{escape(finding.remedy)}[/]"
    return f"[{_COLOURS[finding.level]}]{finding.level}[/] {where}{text}"
