"""What the README says of the configuration is what the code says."""

from __future__ import annotations

from pathlib import Path

from gateway.config_reference import markdown
from gateway.settings import Settings

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- configuration: begin -->\n", "<!-- configuration: end -->"


def test_the_readme_has_the_configuration_table_that_the_command_prints() -> None:
    table = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert table == markdown(), "run `farebox config reference` and put its table between the README's two marks"


def test_every_setting_says_what_it_means() -> None:
    rows = [line.split(" | ") for line in markdown().splitlines()[2:]]
    assert {row[0].strip("| `") for row in rows} >= {
        name for name in Settings.model_fields if name in ("host", "pay_to")
    }
    assert [row[0] for row in rows if not row[-1].strip(" |")] == []
