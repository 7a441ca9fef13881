"""What a person reads while a run goes on."""

from bsq_ray.training.monitoring.console import ProgressLine


def test_console_markup_characters_are_printed_verbatim(capsys):
    """Brackets and colons in paths and messages are printed as they are, not interpreted as markup."""
    with ProgressLine() as line:
        line.show_record({"kind": "place", "step": 0, "out": "runs/[a]/[/b] :smile:", "dashboard": ""})
        line.show_record({"kind": "restart", "step": 3, "reason": "workers were lost ([/gloo/pair.cc:537] Read error)"})
    output = capsys.readouterr().err
    assert "run: runs/[a]/[/b] :smile:" in output
    assert "([/gloo/pair.cc:537] Read error); going on" in output
