"""What a benchmark compares, and on what."""

from dataclasses import dataclass, field

from transformers_msd.costs.settling import LEAST_PASSES
from transformers_msd.drafters.ensemble.views import VIEWS
from transformers_msd.trainer.fields import check_least, check_types
from transformers_msd.trainer.loading import check_dtype, device_of
from transformers_msd.trees.topology import EAGLE
from transformers_msd.trees.tree import TreeConfig


BASELINES = ("static", "assisted", "prompt_lookup", "ngrams")
RUNTIMES = ("eager", "drafting", "all")


@dataclass
class BenchArguments:
    """
    Settings of `transformers-msd bench`.

    Args:
        target_model (`str`, *optional*):
            Folder or Hub repository of the target.
        draft_models (`list[str]`, *optional*):
            Folders or Hub repositories of drafts: trained ones, ours or as others published them, or VLMs and
            language models of the target's tokens.
        trees (`list[str]`, *optional*):
            Trees to draft, each `num_nodes,depth,top_k`, `num_nodes,depth,top_k,min_probability`, or `eagle` for the
            static tree of EAGLE (arXiv 2401.15077); by default each draft's own.
        views (`list[str]`, *optional*):
            Views joined by commas, as `multimodal,text_only`: with each, every draft that is no MSD draft also runs as
            an ensemble.
        runtimes (`list[str]`, *optional*, defaults to `["eager"]`):
            How each of our methods runs: `eager`; with `drafting` compiled; with `all` compiled, the target on a
            static cache, too. On a GPU what is compiled becomes CUDA graphs.
        random_weights (`str`, *optional*):
            Instead of `target_model`: `llava-1.5-7b`, `llava-1.5-13b` or a `config.json`, whose shapes are filled with
            random weights, and an MSD draft for it.
        simulate_acceptance (`list[float]`, *optional*):
            Probabilities with which a simulated draft is right at each depth.
        datasets (`list[str]`, *optional*):
            Where the prompts come from, as in recipes ([`DraftArguments`]): folders, files or Hub datasets; a built-in
            set by default.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of Hub datasets.
        image_folder (`str`, *optional*):
            Folder that the paths of pictures are relative to, instead of their file's.
        prompt_length (`int`, *optional*, defaults to 64):
            Text tokens of prompts for random weights, beside those of one picture.
        num_rows (`int`, *optional*, defaults to 8):
            Rows whose prompts are answered, the first of all datasets.
        batch_sizes (`list[int]`, *optional*, defaults to `[1]`):
            Prompts answered together.
        temperatures (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Temperatures of sampling; 0 is greedy.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer. Random weights never end before.
        repeats (`int`, *optional*):
            Passes over the prompts that are timed, after one to warm up. By default 4 at the least, and more until
            every ratio is settled: the interquartile range of its values in single passes, over the square root of
            their number, is at most 2 % of their median.
        max_passes (`int`, *optional*, defaults to 20):
            Passes after which a comparison ends, settled or not, where `repeats` is not given.
        time_limit (`float`, *optional*):
            Minutes after which a comparison begins no further pass.
        baselines (`list[str]`, *optional*, defaults to all of these):
            What runs beside plain `generate` and the drafts: plain `generate` with a cache that is `static`,
            Transformers' generation `assisted` by the drafts that are models of their own, its `prompt_lookup`, and
            our `ngrams` alone.
        num_divergences (`int`, *optional*, defaults to 0):
            Generations for which the report counts how many differ from plain's, and by which gap. 0 leaves it out.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of all models.
        device (`str`, *optional*):
            Device of all models; a GPU if there is one.
        compile_on_cpu (`bool`, *optional*, defaults to `False`):
            Whether the baseline with a static cache is compiled on a CPU, too.
        memory_bandwidth (`float`, *optional*):
            Memory bandwidth of the device in GB/s. With it the report compares rounds with the time in which the
            target's weights are read once.
        seed (`int`, *optional*, defaults to 0):
            Seed of sampling, random weights and simulated drafts.
        output (`str`, *optional*):
            Folder for `bench.json`, `bench.md` and plots, written after each comparison. A folder that holds an
            unfinished report of the same settings is gone on with.
    """

    target_model: str | None = field(default=None, metadata={"help": "Folder or Hub repository of the target."})
    draft_models: list[str] = field(default_factory=list, metadata={"help": "Drafts, VLMs or language models."})
    trees: list[str] = field(default_factory=list, metadata={"help": "Each `num_nodes,depth,top_k`, or `eagle`."})
    views: list[str] = field(default_factory=list, metadata={"help": "Ensembles, as `multimodal,text_only`."})
    runtimes: list[str] = field(
        default_factory=lambda: ["eager"], metadata={"help": f"Some of {', '.join(RUNTIMES)}: what is compiled."}
    )
    random_weights: str | None = field(default=None, metadata={"help": "llava-1.5-7b, llava-1.5-13b, or a config."})
    simulate_acceptance: list[float] = field(default_factory=list, metadata={"help": "Probabilities per depth."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Folders, files or Hub datasets of prompts."})
    dataset_split: str = field(default="train", metadata={"help": "Split of Hub datasets."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that picture paths are relative to."})
    prompt_length: int = field(default=64, metadata={"help": "Text tokens of prompts for random weights."})
    num_rows: int = field(default=8, metadata={"help": "Rows whose prompts are answered."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Prompts answered together."})
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0], metadata={"help": "0 is greedy."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    repeats: int | None = field(default=None, metadata={"help": "Timed passes; by default until ratios settle."})
    max_passes: int = field(default=20, metadata={"help": "Timed passes at the most, settled or not."})
    time_limit: float | None = field(default=None, metadata={"help": "Minutes after which no pass begins."})
    baselines: list[str] = field(
        default_factory=lambda: list(BASELINES), metadata={"help": f"Some of {', '.join(BASELINES)}, or `none`."}
    )
    num_divergences: int = field(default=0, metadata={"help": "Generations compared with plain's, token by token."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of all models."})
    device: str | None = field(default=None, metadata={"help": "Device of all models; a GPU if there is one."})
    compile_on_cpu: bool = field(default=False, metadata={"help": "Compile the static baseline on a CPU, too."})
    memory_bandwidth: float | None = field(default=None, metadata={"help": "Of the device, in GB/s."})
    seed: int = field(default=0, metadata={"help": "Seed of samples, random weights and simulated drafts."})
    output: str | None = field(default=None, metadata={"help": "Folder for JSON, Markdown and plots."})

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, num_divergences=0, repeats=1, max_passes=LEAST_PASSES)
        if (self.target_model is None) == (self.random_weights is None):
            raise ValueError(
                "Either `target_model` or `random_weights` must be given, got "
                f"{'neither' if self.target_model is None else 'both'}. Name a target, or the shapes of one."
            )
        if self.random_weights and (self.draft_models or self.datasets or self.views):
            raise ValueError(
                "`random_weights` makes its own draft and prompts, got `draft_models`, `views` or `datasets`. Drop "
                "them, or name a `target_model`."
            )
        if self.simulate_acceptance and not (self.draft_models or self.random_weights):
            raise ValueError(
                "`simulate_acceptance` needs a draft whose time is paid, got none. Name one in `draft_models`."
            )
        for name in ("prompt_length", "num_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_new_tokens < 3:
            raise ValueError(
                f"`max_new_tokens` must be at least 3, got {self.max_new_tokens}: the first token is the prefill's, "
                "and the first round is not timed alone."
            )
        if min(self.batch_sizes, default=0) < 1:
            raise ValueError(f"`batch_sizes` must be at least 1, got {self.batch_sizes}.")
        if min(self.temperatures, default=-1) < 0:
            raise ValueError(f"`temperatures` must not be negative, got {self.temperatures}. 0 is greedy.")
        if any(not 0 <= p <= 1 for p in self.simulate_acceptance):
            raise ValueError(f"`simulate_acceptance` must be probabilities, got {self.simulate_acceptance}.")
        if self.baselines == ["none"]:
            self.baselines = []
        if unknown := sorted(set(self.baselines) - set(BASELINES)):
            raise ValueError(f"`baselines` must be some of {', '.join(BASELINES)}, or `none`, got {unknown}.")
        if not self.runtimes or set(self.runtimes) - set(RUNTIMES):
            raise ValueError(f"`runtimes` must be some of {', '.join(RUNTIMES)}, got {self.runtimes}.")
        if self.time_limit is not None and self.time_limit <= 0:
            raise ValueError(f"`time_limit` must be above 0 minutes, got {self.time_limit}.")
        if self.memory_bandwidth is not None and self.memory_bandwidth <= 0:
            raise ValueError(f"`memory_bandwidth` must be above 0 GB/s, got {self.memory_bandwidth}.")
        unknown = sorted({view for views in self.views for view in views.split(",")} - set(VIEWS))
        if unknown:
            raise ValueError(f"`views` must be some of {', '.join(VIEWS)}, joined by commas, got {unknown}.")
        check_dtype(self.dtype, "dtype")
        self.tree_configs = list(dict.fromkeys(parse_tree(tree) for tree in self.trees))
        self.device = device_of(self.device)


def parse_tree(text: str) -> TreeConfig:
    """Read a tree from `num_nodes,depth,top_k` or `num_nodes,depth,top_k,min_probability`, or by its name."""
    if text == "eagle":
        return TreeConfig(topology=EAGLE)
    parts = text.split(",")
    try:
        if len(parts) not in (3, 4):
            raise ValueError
        sizes, probabilities = [int(part) for part in parts[:3]], [float(part) for part in parts[3:]]
    except ValueError:
        raise ValueError(f"`trees` must be `num_nodes,depth,top_k`, as 60,6,10, or `eagle`, got {text!r}.") from None
    return TreeConfig(*sizes, *probabilities)
