"""One visible loop: data, model, optimiser, and the epochs of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cin_fast import checkpoint as checkpoints
from cin_fast import cost, ops
from cin_fast.checkpoint import Checkpoint, CheckpointError
from cin_fast.command import uninterrupted
from cin_fast.config import INDIFFERENT, TrainConfig
from cin_fast.data import ClassBalancedPairSampler, ImageDataset, build_dataset, left_out
from cin_fast.data.seeded import SeededBatches, SeededImages
from cin_fast.distributed import World, on_main, pick_device
from cin_fast.models import Classifier, build_model
from cin_fast.models.backbones import check_image_size
from cin_fast.progress import EpochTotals, epoch_line
from cin_fast.records import RunFolder
from cin_fast.scores import Scores, score

# A resumed run may change these besides: its weights are there already, and its end is not.
_FREE_ON_RESUME = INDIFFERENT | {"epochs", "weights", "eval_every", "backend", "skip_bad_images"}
_PROFILED_STEPS = 5


class TrainingError(RuntimeError):
    """Training cannot go on; says why, and what is left."""


class Trainer:
    """A run: data, model, optimiser and the epoch it stands at.

    Raises:
        ValueError: for a setting that cannot work, before anything is loaded.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.device = pick_device(config.device, world)
        check_image_size(config.backbone, config.image_size)
        ops.pick_backend(torch.empty(0, device=self.device), config.model_backend)
        self.folder = RunFolder(config.output_folder)
        on_main(world, lambda: self.folder.open(resume=config.resume, overwrite=config.overwrite))
        # Until there is something in its place, an earlier run stays.
        self.replaces = self.folder.checkpoint.exists() and not config.resume
        resumed = checkpoints.load(self.folder.checkpoint) if config.resume else None

        self.train_images = _dataset(config, train=True)
        self.test_images = _dataset(config, train=False)
        self.classes = self.train_images.classes
        pairs = ClassBalancedPairSampler(
            self.train_images.labels,
            config.classes_per_batch,
            config.images_per_class,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
        )
        self.batches = SeededBatches(pairs, config.seed, world.rank)
        self.memory_format = (
            torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        )
        torch.manual_seed(config.seed)
        self.model = self._build_model(fresh=resumed is None)
        # float16 alone needs its loss scaled.
        scaled = self._amp_dtype() is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            # The fused one takes momentum from memory that nobody wrote when the first step was
            # left out for an overflow, as it often is.
            fused=not scaled,
        )
        self.schedule = StepLR(self.optimizer, config.lr_step, config.lr_decay)
        self.epoch = 0
        # tested: the last epoch that was.
        self.history = {
            "best_test_top1": 0.0, "seconds": 0.0, "tested": 0, "processes": world.size,
        }  # fmt: skip
        if resumed is not None:
            self._restore(resumed)
        if self.epoch < config.epochs:
            on_main(world, lambda: self.folder.check_space(self._checkpoint_bytes()))
        self.parallel = self._parallel()

    def run(self) -> dict[str, Any]:
        """Train to the last epoch; returns what metrics.json holds."""
        if self.world.main:
            if not self.replaces:
                self.folder.describe(self.config)
                self.folder.forget_after(self.epoch)
            print(self.describe(), flush=True)
        train_loader, test_loader = self._train_loader(), self._test_loader()
        metrics: dict[str, Any] = {}
        with self.folder.curves(active=self.world.main) as draw:
            while self._misses_test() or self.epoch < self.config.epochs:
                if self._misses_test():
                    metrics = self.missed_test(test_loader)
                else:
                    metrics = self.one_epoch(train_loader, test_loader)
                if self.world.main:
                    draw(metrics)
                    print(epoch_line(metrics, self.config.epochs), flush=True)
        if not metrics:
            metrics = self._tested(test_loader)
        return self._finish(metrics)

    def one_epoch(
        self, train_loader: DataLoader[Any], test_loader: DataLoader[Any]
    ) -> dict[str, Any]:
        """Train an epoch, keep it, test where that is due; returns its line of metrics.jsonl."""
        start = time.perf_counter()
        lr = self.schedule.get_last_lr()[0]
        trained = self.train_epoch(train_loader)
        speed = trained["images"] / (time.perf_counter() - start)
        self.schedule.step()
        self.epoch += 1
        metrics: dict[str, Any] = {"epoch": self.epoch, "lr": lr, **trained}
        metrics["images_per_second"] = speed

        # Before the test, too: one that fails costs no epoch.
        self._keep(metrics, time.perf_counter() - start)
        if self._misses_test():
            metrics |= self._tested(test_loader)
            self._keep(metrics, time.perf_counter() - start)
        return metrics

    def missed_test(self, test_loader: DataLoader[Any]) -> dict[str, Any]:
        """Make up for the test that the run was stopped in; returns the epoch's line, now whole."""
        start = time.perf_counter()
        metrics = self.folder.line(self.epoch) | self._tested(test_loader)
        self._keep(metrics, metrics.get("seconds", 0.0) + time.perf_counter() - start)
        return metrics

    def _misses_test(self) -> bool:
        """Whether the epoch is one that is tested, and was not."""
        due = self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs
        return due and self.history["tested"] < self.epoch

    def train_epoch(self, loader: DataLoader[Any]) -> dict[str, float]:
        """One pass over the training set."""
        self.batches.set_epoch(self.epoch)
        self.model.train()
        totals = EpochTotals.zeros(self.device)
        pending: tuple[Tensor, Tensor] | None = None
        bar = tqdm(
            loader, f"epoch {self.epoch + 1}/{self.config.epochs}", unit="batch",
            leave=False, disable=self._hides_bars(),
        )  # fmt: skip
        with self._profiler() as profiled:
            for images, labels, indices in bar:
                loss = self._step(images, labels, totals)
                # Reading a loss waits for the device, so it is read while the next step runs.
                self._check_finite(pending)
                pending = (loss, indices)
                if totals.steps % 10 == 1:
                    bar.set_postfix_str(str(totals))
                profiled()
        self._check_finite(pending)
        self._check_model(images)
        return totals.means()

    def _step(self, images: Tensor, labels: Tensor, totals: EpochTotals) -> Tensor:
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        # Positions (0, 1), (2, 3), ... of a batch are its pairs. The CPU copy is checked for free.
        pairs = torch.arange(len(labels)) ^ 1
        totals.count_pairs(labels, pairs)
        partner = pairs if self.model.uses_pairs else None
        labels = labels.to(self.device, non_blocking=True)
        with self._autocast():
            output = self.parallel(images, partner)
            on_device = None if partner is None else partner.to(self.device, non_blocking=True)
            parts = self.model.loss(output, labels, on_device, self.config.margin)
            loss = parts.total(self.config.alpha)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        logits = output[0] if isinstance(output, tuple) else output
        totals.add(loss.detach(), parts, logits.detach(), labels)
        return loss.detach()

    def test(self, loader: DataLoader[Any]) -> Scores:
        """Scores over the whole test set, shared by all processes."""
        bar = tqdm(loader, "testing", unit="batch", leave=False, disable=self._hides_bars())
        return score(self.model, bar, len(self.classes), self.device, self._autocast())

    def _hides_bars(self) -> bool | None:
        # None: where nobody looks, as in a file.
        return None if self.world.main else True

    def save(self) -> None:
        """Write last.pt."""
        checkpoints.save(
            self.folder.checkpoint,
            Checkpoint(
                model=self.model.state_dict(),
                settings=self.config.recorded(),
                classes=self.classes,
                epoch=self.epoch,
                optimizer=self.optimizer.state_dict(),
                schedule=self.schedule.state_dict(),
                rng=torch.get_rng_state(),
                history=self.history,
                scaler=self.scaler.state_dict(),
            ),
        )

    def _keep(self, metrics: dict[str, Any], seconds: float) -> None:
        """Write an epoch's line and last.pt; the first of a run takes an earlier one's place."""
        self.history["seconds"] += seconds - metrics.get("seconds", 0.0)
        metrics["seconds"] = seconds
        if self.replaces:
            self._take_the_place()
        # The line first: one that last.pt does not know is dropped when the run goes on.
        on_main(self.world, lambda: self.folder.record(metrics))
        on_main(self.world, self.save)

    def _take_the_place(self) -> None:
        """Put this run where the earlier one was: there is a checkpoint at any moment."""

        def begin_anew() -> None:
            self.folder.clear()
            self.folder.describe(self.config)

        # What stands beside the checkpoint must not be the earlier run's.
        with uninterrupted():
            on_main(self.world, self.save)
            self.replaces = False
            on_main(self.world, begin_anew)

    def _checkpoint_bytes(self) -> int:
        """What last.pt takes, about: weights, and SGD's momentum of each."""
        parameters = sum(p.nbytes for p in self.model.parameters())
        buffers = sum(b.nbytes for b in self.model.buffers())
        return parameters * (2 if self.config.momentum else 1) + buffers

    def describe(self) -> str:
        """Settings, data, batch structure and model, as printed at the start."""
        config, size = self.config, self.world.size
        millions = cost.parameters(self.model) / 1e6
        skipped = self.train_images.skipped + self.test_images.skipped
        images = (
            f"{len(self.train_images)} training and {len(self.test_images)} test images of "
            f"{len(self.classes)} classes"
        )
        batch = (
            f"global batch {config.batch_size * size} = {size} x {config.classes_per_batch} classes"
            f" x {config.images_per_class} images, {config.batch_size * size // 2} pairs, each "
            "within one process"
        )
        lines = [
            config.describe(),
            "",
            images,
            batch,
            f"{config.method} on {config.backbone}, {millions:.1f} M parameters, {self.device}",
            f"everything of this run goes to {self.folder.path}",
        ]
        unread = left_out(config.dataset, config.data_root or None)
        lines += [f"left out {unread}"] if unread else []
        lines += [f"skipped {len(skipped)} bad images:", *skipped] if skipped else []
        return "\n".join(lines)

    def _tested(self, loader: DataLoader[Any]) -> dict[str, float]:
        scores = self.test(loader)
        self.history["best_test_top1"] = max(self.history["best_test_top1"], scores.top1)
        self.history["tested"] = self.epoch
        return {"test_top1": scores.top1, "test_top5": scores.top5}

    def _finish(self, last: Mapping[str, Any]) -> dict[str, Any]:
        metrics = {
            "test_top1": last["test_top1"],
            "test_top5": last["test_top5"],
            "best_test_top1": self.history["best_test_top1"],
            "best_test_top1_note": "optimistic: the epoch was chosen on the test set",
            "chance_top1": 1 / len(self.classes),
            "num_classes": len(self.classes),
            "epochs": self.epoch,
            "seconds": self.history["seconds"],
            "method": self.config.method,
            "backbone": self.config.backbone,
            "dataset": self.config.dataset,
            "seed": self.config.seed,
            "parameters": cost.parameters(self.model),
            "skipped_images": len(self.train_images.skipped) + len(self.test_images.skipped),
        }
        if self.world.main:
            self.folder.finish(metrics)
        return metrics

    def _build_model(self, fresh: bool) -> Classifier:
        config = self.config
        model = build_model(
            config.method,
            len(self.classes),
            config.backbone,
            # A resumed run takes its weights from the checkpoint.
            config.weights if fresh else "none",
            pooled=config.pooled,
            embedding_dim=config.embedding_dim,
            backend=config.model_backend,
        )
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def _restore(self, resumed: Checkpoint) -> None:
        path, ours = self.folder.checkpoint, dataclasses.asdict(self.config)
        for name, value in resumed.settings.items():
            if name not in _FREE_ON_RESUME and ours.get(name) != value:
                raise CheckpointError(
                    f"--resume: {path} was trained with {name} = {value}, not {ours.get(name)}"
                )
        if resumed.epoch > self.config.epochs:
            raise CheckpointError(
                f"--epochs: {path} has {resumed.epoch} already, more than {self.config.epochs}"
            )
        if resumed.classes != self.classes:
            raise CheckpointError(
                f"--resume: {path} knows {resumed.num_classes} classes, the dataset has "
                f"{len(self.classes)}, or the same under other names"
            )
        processes = resumed.history.get("processes", self.world.size)
        if processes != self.world.size:
            raise CheckpointError(
                f"--resume: {path} was trained by {processes} processes, not {self.world.size}: "
                "each has a batch of its own"
            )
        checkpoints.load_weights(self.model, resumed.model, path)
        self.optimizer.load_state_dict(resumed.optimizer)
        self.schedule.load_state_dict(resumed.schedule)
        if resumed.scaler:
            self.scaler.load_state_dict(resumed.scaler)
        torch.set_rng_state(resumed.rng)
        self.epoch = resumed.epoch
        # Of an earlier version's checkpoint nobody knows; they are taken for right.
        unknown = {"tested": resumed.epoch, "processes": self.world.size}
        self.history = unknown | resumed.history

    def _parallel(self) -> nn.Module:
        module: nn.Module = self.model
        if self.world.size > 1:
            module = nn.parallel.DistributedDataParallel(
                module, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        return torch.compile(module) if self.config.compile else module  # type: ignore[return-value]

    def _train_loader(self) -> DataLoader[Any]:
        return DataLoader(
            SeededImages(self.train_images),
            batch_sampler=self.batches,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.config.workers > 0,
        )

    def _test_loader(self) -> DataLoader[Any]:
        mine = range(self.world.rank, len(self.test_images), self.world.size)
        return DataLoader(
            Subset(self.test_images, mine),
            batch_size=self.config.eval_batch_size,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.config.workers > 0,
        )

    def _amp_dtype(self) -> torch.dtype | None:
        name = self.config.amp
        if name == "auto":
            name = "bf16" if self.device.type == "cuda" else "none"
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self._amp_dtype()
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _check_finite(self, pending: tuple[Tensor, Tensor] | None) -> None:
        if pending is None or math.isfinite(pending[0].item()):
            return
        names = "\n  ".join(self.train_images.name(i) for i in pending[1].tolist())
        raise TrainingError(
            f"the loss became {pending[0].item()} in epoch {self.epoch + 1}; {self._cure()}; "
            f"the batch was:\n  {names}"
        )

    @torch.no_grad()
    def _check_model(self, images: Tensor) -> None:
        # What the last step of an epoch did shows in no loss, and would be kept.
        self.model.eval()
        with self._autocast():
            logits = self.model(images.to(self.device, memory_format=self.memory_format))
        if not bool(logits.isfinite().all()):
            raise TrainingError(
                f"the model's logits are not finite after epoch {self.epoch + 1}; {self._cure()}"
            )

    def _cure(self) -> str:
        kept = self.folder.checkpoint
        left = f"{kept} holds the epoch before" if kept.exists() else "there is no checkpoint yet"
        if self.replaces:
            left = f"the run that {self.folder.path} held is intact"
        return f"a lower --lr or a --clip-norm is the usual cure; {left}"

    def left(self) -> str:
        """What is there of the run, where it is stopped now."""
        if self.replaces:
            return f"no epoch was finished, and the run that {self.folder.path} held is intact"
        if self.folder.checkpoint.is_file():
            return "finished epochs are kept: --resume goes on"
        return "no epoch was finished"

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Callable[[], None]]:
        if not (self.config.profile and self.world.main and self.epoch == 0):
            yield lambda: None
            return
        from torch.profiler import profile, schedule

        path = self.folder.path / "trace.json"
        with profile(
            schedule=schedule(wait=1, warmup=1, active=_PROFILED_STEPS),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ) as profiler:
            yield profiler.step


def _dataset(config: TrainConfig, *, train: bool) -> ImageDataset:
    return build_dataset(
        config.dataset,
        Path(config.data_root) if config.data_root else None,
        train=train,
        image_size=config.image_size,
        skip_bad_images=config.skip_bad_images,
        # The pictures of the synthetic set do not change with the seed of a run.
        seed=0,
    )
