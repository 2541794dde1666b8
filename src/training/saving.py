"""A run's checkpoints: what goes into them is gathered from all ranks, rank 0 writes."""

from __future__ import annotations

import logging
from argparse import Namespace

import torch

from training.checkpoint import LATEST, Continuation
from training.checkpoint_writer import CheckpointWriter
from training.data.report import REPORT_FILE, DataReport
from training.data.samples import Counts
from training.errors import UserError
from training.loop import Training
from training.random_state import rng_state
from training.remote_sync import RemoteSync
from training.run_folder import RunFolder
from training.table_files import save_tables


class Saver:
    """Writes a run's checkpoints. All ranks call it alike.

    Args:
        writer: writes the files, on rank 0; elsewhere it has nothing to do.
        sync: where files are copied to, None for nowhere. Rank 0's.

    Attributes:
        saved_step: the step of the last checkpoint that was tried, or that the run went on from; alike on all ranks.
    """

    def __init__(
        self, folder: RunFolder, training: Training, writer: CheckpointWriter, sync: RemoteSync | None
    ) -> None:
        self._args: Namespace = training.args
        self._folder = folder
        self._training = training
        self._world = training.world
        self._writer = writer
        self._sync = sync
        self.saved_step: int | None = None
        self._failed = False
        # What an interrupted process counted in the present epoch, on rank 0.
        self._before = DataReport()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written in the background."""
        return self._writer.busy

    def within_epoch(self, steps_done: int, numbered: bool, last: bool = False) -> None:
        """Write epoch_latest.pt, and iter_S.pt if `numbered`.

        Args:
            steps_done: of the present epoch.
            last: the process ends after this: wait until it is written.
        """
        names = [f"iter_{self._training.state.step}.pt", LATEST] if numbered else [LATEST]
        self._save(names, steps_done)
        if last:
            self._wait()

    def between_epochs(self) -> None:
        """Write epoch_latest.pt where an epoch is whole and the run has to end, unless that state has been saved."""
        if self.saved_step != self._training.state.step:
            self._save([LATEST], steps_done=0)
            self._wait()

    def after_epoch(self, numbered: bool) -> None:
        """Write what is due after an epoch, `state.epoch` being counted up already.

        Args:
            numbered: whether iter_S.pt is due as well.
        """
        args, state = self._args, self._training.state
        is_last = state.epoch == args.stop_epochs
        names = []
        if is_last or (args.save_frequency > 0 and state.epoch % args.save_frequency == 0):
            names.append(f"epoch_{state.epoch}.pt")
        if numbered:
            names.append(f"iter_{state.step}.pt")
        if numbered or args.save_most_recent or args.save_every_n_steps or args.save_every_minutes:
            names.append(LATEST)
        if names:
            self._save(names, steps_done=0)
        if is_last:
            self._wait()

    def close(self, seconds: float) -> None:
        """Until everything is written, and copied as far as that is done within so many seconds."""
        self._wait()
        self._writer.close()
        if self._sync is not None:
            self._sync.finish(seconds)

    def report(self, steps_done: int) -> DataReport:
        """What became of the present epoch's samples in its first steps, over all ranks and interrupted processes."""
        report = DataReport.from_state(self._before.state())
        for counts in self._world.gather(tuple(self._training.loader.counts(steps_done))):
            report.add(Counts(*counts))
        return report

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as is known on this rank."""
        return self._failed or self._writer.has_failed

    def resume(self, there: Continuation) -> None:
        """The run goes on from a checkpoint, which has been loaded."""
        self.saved_step = self._training.state.step
        if there.step_in_epoch > 0:
            self._before = DataReport.from_state(there.data_report)

    def start_epoch(self) -> None:
        """To be called before the first step of an epoch: what others counted was of the last one."""
        self._before = DataReport()

    def totals_before(self) -> tuple[int, int]:
        """Samples that interrupted processes counted in the present epoch, over all ranks: good, left out."""
        return self._before.good, self._before.left_out

    def finish_report(self) -> None:
        """Write the epoch's entry of data_report.json; `state.epoch` is counted up already.

        To be called before the epoch's checkpoint is written: whoever goes on from that does not come back to this epoch.
        """
        report = self.report(self._training.loader.steps_per_epoch)
        if self._world.is_main:
            try:
                report.write(self._folder.path / REPORT_FILE, self._training.state.epoch)
            except OSError as error:
                logging.error("%s cannot be written: %s", REPORT_FILE, error.strerror)
            if report.left_out:
                logging.warning("epoch %d: %s", self._training.state.epoch, report.summary())

    def _save(self, names: list[str], steps_done: int) -> None:
        """steps_done: 0 when `state.epoch` epochs are whole."""
        args, training, state = self._args, self._training, self._training.state
        self.saved_step = state.step
        try:
            tables = save_tables(state.objective, self._folder.checkpoints, state.step, self._world)
        except (OSError, UserError) as error:
            self._failed = True
            if self._world.is_main:
                self._writer.report_failure(error)
            return
        # On ranks that write no more than tables this is all there is to say.
        self._failed = False
        generators = self._world.gather(rng_state(self._world.device))
        there = Continuation(steps_done, training.loader.steps_per_epoch, generators)
        if steps_done:
            places = self._world.gather(training.loader.place(steps_done))
            there.data = training.loader.state(torch.stack(places), steps_done)
            there.data_report = self.report(steps_done).state()
        content = state.to_checkpoint(args.name, args.model, tables, there)
        if self._world.is_main:
            self._note(self._writer.save(names, content, {"epoch": state.epoch, "step": state.step}))
        if not args.save_in_background:
            # In the patient channel the others wait as long as it takes, in the next step's collective they would not.
            self._world.from_main(None)

    def _wait(self) -> None:
        """Until what is written in the background is there; what is not has been waited for."""
        if self._args.save_in_background:
            self._note(self._writer.wait())

    def _note(self, failure: str | None) -> None:
        self._failed = failure is not None
