"""The figures of a bench in the ``model-index`` of a model card, where the Hub shows them."""

from pathlib import Path

from dino_depth.errors import ConfigError, ReportedError

__all__ = ["check_target", "evaluations", "push"]


def check_target(target: str):
    """Refuses a target that is neither a folder with a card nor a possible repository, before anything is measured.

    Raises:
        ConfigError: it is neither.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if Path(target).is_dir():
        if not (Path(target) / "README.md").is_file():
            raise ConfigError(f"--push {target}: no README.md in the folder: export first")
        return
    try:
        validate_repo_id(target)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {target}: neither a folder nor a repository: {' '.join(str(error).split())}"
        ) from None
    if target.count("/") != 1:
        raise ConfigError(f"--push {target}: no such folder, and a repository is named owner/name")


def evaluations(result: dict) -> list:
    """The first encoder's figures, as ``EvalResult`` of huggingface_hub: every source, raw and filled."""
    from huggingface_hub import EvalResult

    label = result["encoders"][0]["label"]
    found = []
    for source in result["sources"]:
        for row in source["rows"]:
            if row.rpartition(", ")[0] != label:
                continue
            for key, estimate in source["estimates"][row].items():
                if estimate is None:
                    continue
                figure = result["figures"][key]
                found.append(
                    EvalResult(
                        task_type="image-feature-extraction",
                        dataset_type=source["name"],
                        dataset_name=f"{source['name']}, {row.rpartition(', ')[2]}: {source['what']}",
                        dataset_config=row.rpartition(", ")[2],
                        metric_type=key,
                        metric_name=figure["words"],
                        metric_value=round(estimate["value"], 5),
                        metric_args={"low": round(estimate["low"], 5), "high": round(estimate["high"], 5)},
                    )
                )
    return found


def push(result: dict, target: str):
    """Writes the figures into the card of a folder or a repository; figures of other evaluations stay.

    Raises:
        ReportedError: the card cannot be read or written, or the Hub refuses.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results

    file = Path(target) / "README.md"
    try:
        card = ModelCard.load(file if file.is_file() else target)
        new = evaluations(result)
        own = {entry.unique_identifier for entry in new}
        index = card.data.to_dict().get("model-index")
        name = target.rstrip("/").rpartition("/")[2]
        old = model_index_to_eval_results(index)[1] if index else (card.data.eval_results or [])
        kept = [entry for entry in old if entry.unique_identifier not in own]
        card.data.model_name = card.data.model_name or name
        card.data.eval_results = kept + new
        if file.is_file():
            card.save(file)
        else:
            card.push_to_hub(target, commit_message="dino-depth bench")
    except Exception as error:  # noqa: BLE001 - besides its own errors the client lets its HTTP library's through
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ReportedError(f"--push {target}: {reason}") from error
    print(f"{len(new)} figures are in the model-index of {file if file.is_file() else target}")
