"""What a pull or a pack would take and give, for the commands that show it before it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llm_flash_moe.commands.describe import describe_plan, size
from llm_flash_moe.errors import printable

if TYPE_CHECKING:
    from flash_moe import PullJob

# One of a job's forms.
Form = Any

# For the time that a download takes; nobody knows the user's.
EXAMPLE_RATE = 100e6
FORMS: dict[tuple[int | None, bool], str] = {
    (None, False): "as it is",
    (None, True): "--planes",
}


def disk_rate(job: PullJob) -> float | None:
    """What the disk of the target gives for records of this model."""
    from flash_moe import Diagnosis

    plan = job.form.model
    place = next(folder for folder in job.target.parents if folder.is_dir())
    try:
        return None if plan is None else Diagnosis.place(place, plan.record_bytes)
    except OSError:
        return None  # what cannot be written to is reported when it has to be


def plan_to_json(job: PullJob, rate: float | None) -> dict[str, Any]:
    forms = [form.to_json() for form in job.forms()]
    return {**job.to_json(), "disk_rate": rate, "forms": forms}


def print_pull(name: str, job: PullJob, rate: float | None) -> None:
    """The plan, and the other forms beside it."""
    form = job.form
    assert form.model is not None
    repository = job.repository
    minutes = job.fetch_bytes / EXAMPLE_RATE / 60
    here = f"; {size(job.here_bytes)} are here already" if job.here_bytes else ""
    click.echo(f"{repository.name} at {repository.commit[:10]}")
    click.echo(printable(describe_plan(name, form.model, rate)))
    click.echo(
        f"  to fetch  {size(job.fetch_bytes)}: {minutes:,.0f} minutes at 100 MB/s{here}\n"
        f"  to keep   {size(form.pack_bytes)}; {size(form.peak_bytes)} at most on the way, of "
        f"{size(job.free_bytes + job.here_bytes)} that are free"
    )
    click.echo("It can be kept as:")
    for other in job.forms():
        click.echo(printable(_line(other, other is form, rate)))


def _line(form: Form, chosen: bool, rate: float | None) -> str:
    title = FORMS.get((form.bits, form.planes), f"--bits {form.bits}")
    start = f"{'*' if chosen else ' '} {title:<9} "
    if form.model is None:
        return f"{start}refused: {form.refused}"
    speed = form.model.tokens_per_second(rate or 5e9)
    line = (
        f"{start}{size(form.pack_bytes)}, {size(form.peak_bytes)} on the way; a token reads "
        f"{size(form.model.token_bytes)}, {speed:,.1f} tokens/s"
    )
    return line + (f"\n{'':<12}less exact: {'; '.join(form.lossy)}" if form.lossy else "")
