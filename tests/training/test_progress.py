"""What a person reads while a run goes on."""

from bsq_ray.training.monitoring.console import ProgressLine


def test_paths_and_messages_with_brackets_and_colons_are_shown_as_they_are(capsys):
    with ProgressLine() as line:
        line.show({"kind": "place", "step": 0, "out": "runs/[a]/[/b] :smile:", "dashboard": ""})
        line.show({"kind": "restart", "step": 3, "reason": "workers were lost ([/gloo/pair.cc:537] Read error)"})
    told = capsys.readouterr().err
    assert "run: runs/[a]/[/b] :smile:" in told
    assert "([/gloo/pair.cc:537] Read error); going on" in told
