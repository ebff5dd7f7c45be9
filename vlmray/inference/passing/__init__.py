"""What is passed on of a finished run: predictions to the hub, figures to trackers."""

from vlmray.inference.passing.figures import run_figures
from vlmray.inference.passing.predictions import push_predictions
from vlmray.inference.plan import InferenceRun
from vlmray.inference.summary import Summary
from vlmray.publishing.trackers import report_figures


def pass_on(run: InferenceRun, summary: Summary) -> None:
    """Pass on what the options say.

    Raises:
        PushError, TrackerError: The hub, or a tracker, did not take it.
    """
    if run.repo:
        push_predictions(run, run.repo, summary)
    if run.config.report_to != "none":
        report_figures(run.config.report_to, run_figures(run, summary))
