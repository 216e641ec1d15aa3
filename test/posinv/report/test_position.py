from posinv.report.convergence import fine_tuning_curves
from posinv.report.experiment import Experiment
from posinv.report.position import convergence_drawing, convergence_table
from posinv.report.results import ABSENT


def test_convergence_through_each_ssl_model(tmp_path, save_epochs):
    """The mean over the seeds after each epoch; no figure where a training has ended before."""
    for model, epochs in (("conv32", 2), ("sin16", 3)):
        for seed in (1, 2):
            for number, criterion in enumerate(("ssl_mse", "ssl_softdtw")):
                folder = tmp_path / model / f"seed{seed}" / criterion
                save_epochs(
                    folder,
                    epochs,
                    total_count=lambda epoch: 40 * epoch,
                    ssl_mse=lambda epoch, k=10 * number + seed: k / epoch,
                )
                (folder / "config.yaml").write_text("accum_grad: 1\n")
    convergence = {
        name: fine_tuning_curves(Experiment.read(tmp_path / name), "ssl_mse")["updates"]
        for name in ("conv32", "sin16")
    }
    table = convergence_table(convergence)
    assert [column.name for column in table.columns] == [
        *("SSL model", "criterion", "40 updates", "80 updates", "120 updates")
    ]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["conv32", "ssl_mse", "1.50 ± 0.71", "0.75 ± 0.35", ABSENT],
        ["conv32", "ssl_softdtw", "11.50 ± 0.71", "5.75 ± 0.35", ABSENT],
        ["sin16", "ssl_mse", "1.50 ± 0.71", "0.75 ± 0.35", "0.50 ± 0.24"],
        ["sin16", "ssl_softdtw", "11.50 ± 0.71", "5.75 ± 0.35", "3.83 ± 0.24"],
    ]
    panels = convergence_drawing(convergence).axes
    assert [panel.get_ylabel() for panel in panels] == ["conv32: MSE", "sin16: MSE"]
    assert [len(panel.lines) for panel in panels] == [4, 4]
