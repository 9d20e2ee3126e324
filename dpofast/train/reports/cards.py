"""The part of DPOTrainer that writes model cards, and pushes to the Hugging Face Hub."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from dpofast.errors import ConfigError, one_line
from dpofast.model.parts import causal_lm
from dpofast.monitor.card import CARD_FILE, is_kept, model_card
from dpofast.monitor.guard import ReportGuard
from dpofast.monitor.plots import PLOT_FILE
from dpofast.monitor.public_names import hub_id
from dpofast.train.reports.card_facts import card_facts, card_title, check_card_arguments
from dpofast.train.reports.reports_run import ReportsRun

logger = logging.getLogger(__name__)


class WritesCards(ReportsRun, Trainer):
    """Gives every saved model a card, and the Trainer the arguments of TRL for cards.

    Attributes:
        base_model: hub id of the model before training; None if it isn't known to be there.
        dataset_names: hub ids or paths of the training data, for the card. By default, the card
            says what the dataset knows about itself.
        eval_dataset_names: the same for a single evaluation set.
        given_optimizers: optimizer and scheduler that the user passed; None for the Trainer's own.
    """

    _tag_names: Sequence[str] = ("dpofast", "dpo")  # under the name that TRL gives them

    dataset_names: Sequence[str] = ()
    eval_dataset_names: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        self._card_arguments: dict[str, Any] = {}
        self._card_guard = ReportGuard()
        self._kept_cards: set[Path] = set()
        self.given_optimizers = options.get("optimizers", (None, None))
        super().__init__(*args, **options)
        lm = causal_lm(self.model)
        # Found out now, as a relative path may mean something else later.
        self.base_model = hub_id(getattr(lm.config, "_name_or_path", None))
        if hasattr(lm, "add_model_tags"):
            lm.add_model_tags(list(self._tag_names))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        *,
        language: str | list[str] | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the model card, README.md, to the output folder; only rank 0 writes.

        A card that dpofast didn't write, or that was changed since, is kept. What is given here is
        also in the cards that later saves write. Local paths are shortened to the file's name.

        Args:
            model_name: the card's title; by default the last part of hub_model_id or output_dir.
            dataset_name: hub ids of the training data, or names of files.
            tags: further tags.
            language: languages of the model, as the hub abbreviates them.
            license: id of a license that the hub knows; by default that of the model before
                training, if its card is on this disk.
            finetuned_from: hub id of the model before training.
            tasks: tasks of the hub; the first one replaces text-generation.
            dataset_tags: the same as `dataset_name`.
            dataset: the same as `dataset_name`.
            dataset_args: configurations of these datasets, in their order.

        Raises:
            ConfigError: an argument has the wrong type, or the license is no id.
        """
        given = {
            "model_name": model_name,
            "dataset_name": dataset_name,
            "tags": tags,
            "language": language,
            "license": license,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
        }
        given = {name: value for name, value in given.items() if value is not None}
        check_card_arguments(given)
        self._card_arguments |= given
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the model to the output folder, write its card, and upload the folder.

        Args:
            commit_message: message of the commit.
            blocking: return only when the upload has ended.
            token: token with the right to write; by default that of hub_token, or of the login.
            revision: branch to commit to.
            private: whether a repository that is made here is private.
            card: arguments of `create_model_card`.

        Returns:
            What huggingface_hub's `upload_folder` returns; None on other ranks than 0.

        Raises:
            ConfigError: an argument of the card can't be used; or the repository can't be made, but
                the model is saved nevertheless.
        """
        # What isn't given stays as it was; transformers would put its own defaults in its place.
        card = {name: value for name, value in card.items() if value is not None}
        check_card_arguments(card)
        given = self._card_arguments | card
        tags = given.get("tags", [])
        card["tags"] = [tags] if isinstance(tags, str) else list(tags)
        card["model_name"] = card_title(self, given)
        if self.hub_model_id is None:
            try:
                self.init_hf_repo(token=token, private=private)
            except ConfigError as error:
                self.save_model(_internal_call=True)  # other ranks save in their push_to_hub
                raise ConfigError(f"{error} The model is saved in output_dir.") from error
        return super().push_to_hub(commit_message, blocking, token, revision, **card)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, when the trainer is made if push_to_hub is set.

        Raises:
            ConfigError: it can't be made, with the hub's reason.
        """
        configured = self.args.hub_private_repo
        # Older versions of transformers have no argument `private`.
        self.args.hub_private_repo = configured if private is None else private
        try:
            super().init_hf_repo(token=token)
        except Exception as error:  # no login, no connection, no rights, an id that can't be one
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            raise ConfigError(
                f"push_to_hub: the repository {name!r} can't be made or reached on the hub: "
                f"{one_line(error).rstrip('.')}. Log in with `hf auth login`, or set hub_token "
                "and hub_model_id."
            ) from error
        finally:
            self.args.hub_private_repo = configured

    def write_results(self, output: TrainOutput, wall_seconds: float) -> None:
        super().write_results(output, wall_seconds)
        folder = Path(self.args.output_dir)
        with self._card_guard(CARD_FILE):
            if (folder / CARD_FILE).is_file() and not is_kept(folder):
                self.write_card(folder)  # a checkpoint has written it, without the plot

    def write_card(self, folder: str | Path) -> None:
        """Write the card and the plot to a folder; what can't be written is a warning.

        Args:
            folder: folder of a saved model.
        """
        folder = Path(folder)
        with self._card_guard(CARD_FILE):
            if is_kept(folder):
                self._say_kept(folder)
                return
            folder.mkdir(parents=True, exist_ok=True)
            plot = self.plot_file if self.plot_file and self.plot_file.is_file() else None
            if plot is not None and plot.parent.resolve() != folder.resolve():
                shutil.copy(plot, folder)
            facts = card_facts(self, self._card_arguments, self._card_guard)
            text = model_card(facts, PLOT_FILE if plot is not None else None)
            (folder / CARD_FILE).write_text(text, encoding="utf-8")

    @contextmanager
    def own_card(self, folder: str | Path) -> Iterator[None]:
        """Write the card of a model that is saved inside the `with` block.

        peft writes a card, too, and changes one that is there: ours replaces it, or the user's is
        put back.
        """
        path = Path(folder) / CARD_FILE
        users, is_known = None, False
        with self._card_guard(CARD_FILE):
            users = path.read_bytes() if is_kept(path.parent) else None
            is_known = True
        try:
            yield
        finally:
            with self._card_guard(CARD_FILE):
                if users is not None:
                    path.write_bytes(users)
                elif is_known:
                    path.unlink(missing_ok=True)  # that of peft, which would count as the user's
        self.write_card(folder)

    def _say_kept(self, folder: Path) -> None:
        if folder not in self._kept_cards:
            self._kept_cards.add(folder)
            logger.warning(
                "%s is kept, because dpofast didn't write it or it was changed since; move it "
                "away to get a card of this run.",
                folder / CARD_FILE,
            )
