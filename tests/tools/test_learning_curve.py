"""The learning curve's table has a line for each row, in order."""


def test_rows_are_in_order_of_samples_and_passes(tools, tmp_path, capsys):
    curve, benchmark = tools("learning_curve"), tools("benchmark")
    row = {"learned": 0.1, "held back": 0.2, "loss": 0.3, "agreement": 0.5, "top1": 0.25}
    results = tmp_path / "curve.jsonl"
    for samples, passes, varied in ((1000, 4, False), (256, 16, True), (256, 4, False)):
        more = {"samples": samples, "passes": passes, "varied": varied, "seconds": 61.2}
        benchmark.append(results, {**row, **more})
    curve.table(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 256 | 4 | 0.100 | 0.200 | 0.300 | 50.0% | 25.0% | 61 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 256", "| 256, varied", "| 1000"]
