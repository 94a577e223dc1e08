"""`make bench-retrieval`: what search finds on test sets, leg by leg, beside bm25s. The last line is one JSON object.

    ARGS="folder another"    other sets in the layout of BEIR; default: the committed question sets
    ARGS="--also FOLDER"     sets beside those, such as a folder of Cranfield, which is not part of the repository
    ARGS="--results FILE"    keeps what was measured, so that a run that was ended goes on with the next set

Each set is measured as `windfarm eval retrieval` does it, with one loaded model for all. Per set: `dense`, `sparse`,
`fused` as there; `bm25s`: nDCG@10 and recall@100 of that library on the same passages; `sweep`, `tuned`, `refusal`:
every fusion, the one chosen on half of the questions, and how often a fitted threshold errs. Over all sets:
`leave_one_out` (the fusion that is best on the others), `languages` (questions in one, paragraphs in another) and
`follow_ups`. `scale` is the speed half: searches in large collections, ingest, memory, each through the endpoint of a
windfarm that is started for it, beside LangChain (`python -m tests.bench.scale` is this half alone; without it, as with
`--passages 0 --compared 0 --rounds 0`, nothing is started and no `scale` printed).
"""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from rag.bm25 import known_language
from rag.judged_set import JudgedSet, read_judged_set
from rag.ranking_metrics import ndcg, recall
from services.config import EmbeddingConfig
from services.evaluation_index import EmbeddingModel, cut_documents, open_serving_model
from services.evaluation_settings import EvaluationSettings
from services.evaluation_view import evaluation_json
from services.ray_config import load_ray_config
from services.retrieval_evaluation import evaluate
from tests.bench.reference_bm25 import reference_rankings
from tests.bench.scale import SETS, add_arguments, measure_scale, options_of
from tests.bench.tuning import leave_one_out, measure_follow_ups, measure_languages, measure_tuning, remembering

ROOT = Path(__file__).resolve().parents[2]
FOLLOW_UPS = ROOT / "tests" / "data" / "follow-ups"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=SETS, help="test sets")
    parser.add_argument("--also", nargs="+", type=Path, default=[], metavar="FOLDER", help="test sets beside those")
    parser.add_argument("--results", type=Path, help="a file with earlier results, to add to")
    add_arguments(parser)
    options = parser.parse_args()
    folders = [*options.folders, *options.also]
    if len({folder.name for folder in folders}) < len(folders):
        parser.error("two folders have the same name, under which their results would be kept")
    results: dict[str, Any] = {}
    if options.results is not None and options.results.exists():
        results = json.loads(options.results.read_text("utf-8"))
    over_all = asyncio.run(measure(folders, results, options.results))
    scale = measure_scale(SETS, options_of(options))
    print(json.dumps(results | over_all | ({"scale": scale} if scale else {})))


async def measure(folders: list[Path], results: dict[str, Any], keep_in: Path | None) -> dict[str, Any]:
    """Fills `results` set by set; returns what is known over all of them."""
    settings = EvaluationSettings.of(load_ray_config(ROOT / "ray_config.yaml").app)
    async with open_serving_model(settings.embed) as model:
        open_model = remembering(model)
        for folder in folders:
            if folder.name in results:
                continue
            judged = read_judged_set(folder)
            results[folder.name] = await measure_set(judged, settings, model)
            results[folder.name] |= await measure_tuning(judged, settings, open_model)
            print(summary(folder.name, results[folder.name]), flush=True)
            if keep_in is not None:
                keep_in.write_text(json.dumps(results), "utf-8")
        sets = {folder.name: read_judged_set(folder) for folder in folders}
        return {
            "leave_one_out": leave_one_out({name: results[name] for name in sets}),
            "languages": await measure_languages(sets, settings, open_model),
            "follow_ups": await measure_follow_ups(FOLLOW_UPS, settings, open_model),
        }


async def measure_set(judged: JudgedSet, settings: EvaluationSettings, model: EmbeddingModel) -> dict[str, Any]:
    @asynccontextmanager
    async def loaded(config: EmbeddingConfig) -> AsyncIterator[EmbeddingModel]:
        yield model

    measured = await evaluate(judged, [settings], open_model=loaded)
    return evaluation_json(judged, measured) | {"bm25s": reference(judged, settings, model)}


def reference(judged: JudgedSet, settings: EvaluationSettings, model: EmbeddingModel) -> dict[str, float]:
    passages = [stored for _, stored in cut_documents(judged.documents, model.token_spans, settings.ingestion)]
    language = known_language(Counter(passage.language for passage in passages).most_common(1)[0][0])
    assert language is not None, "the sets are in languages that windfarm knows"
    found = list(zip(reference_rankings(judged, passages, language), judged.queries, strict=True))
    return {
        "ndcg@10": mean(ndcg(ranking, query.judgements, 10) for ranking, query in found),
        "recall@100": mean(recall(ranking, query.judgements, 100) for ranking, query in found),
    }


def summary(name: str, result: dict[str, Any]) -> str:
    shown = {leg: f"{100 * result[leg]['ndcg@10']:.1f}" for leg in ("bm25s", "sparse", "dense", "fused")}
    return f"{name}: nDCG@10 {shown}, {result['num_passages']} passages"


if __name__ == "__main__":
    main()
