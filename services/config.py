"""The whole configuration, typed and closed: `ray_config.yaml` is checked against these models before anything starts.

Each Serve application gets only its own slice as `args` (Ray takes the hash of an application's `args` as the version
of all its deployments: one shared slice would restart everything at any edit). Replica counts and resources are not
here: they live in the `deployments:` overrides of the Serve file. Where a machine keeps its data and which secrets it
uses comes from the environment, so that one file serves every machine.
"""

# Annotations stay real objects in this module: a Ray application builder whose annotation is a string is not validated.

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Port = Annotated[int, Field(ge=1, le=65535)]


class ModelConfig(Section):
    """One chat model: `args` of an application `llm-<id>`."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """The name that clients use."""
    source: str = "tiny"
    """A catalogue name, a folder, a .gguf file, `hf:owner/name` of a hub, or `https://.../v1` of a remote API."""
    engine: Literal["auto", "vllm", "llamacpp", "remote"] = "auto"
    max_context: Annotated[int, Field(ge=64)] | None = None
    """Tokens of prompt and answer together; none: what the model was trained for."""
    parallel_requests: Annotated[int, Field(ge=1, le=1024)] = 4
    """Generations that run at once in one replica."""
    max_queued_requests: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait in one replica; beyond them clients get 503 with Retry-After."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of one replica (of one rank); none: all cores of the machine, divided among the ranks on it."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that one replica (one rank) asks Ray for; none: weights, KV cache and engine, computed from the
    model's files."""
    data_parallel_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Ranks of one gang. A gang is one copy of a mixture of experts, cut over as many Serve replicas as it has ranks;
    `num_replicas` counts ranks, so it is a multiple of this."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks inside one replica that share every layer; they stay on one node."""
    expert_parallel: bool = True
    """Whether each rank of a mixture holds whole experts; otherwise a slice of every expert."""
    expert_placement: Literal["linear", "planned"] = "linear"
    """Which rank holds which experts: neighbours together, or balanced by the load in `expert_trace`. On GPUs `planned`
    turns vLLM's own balancer (EPLB) on, with as many copies of experts as `plan` has."""
    expert_trace: str | None = None
    """A routing trace of this model (`windfarm experts --save`), for `expert_placement: planned`."""
    plan: str | None = None
    """A plan that `windfarm plan --json` wrote: its nodes, and its experts per rank, instead of choosing them here."""
    expert_ranks: tuple[tuple[int, ...], ...] | None = None
    """For `expert_placement: planned` where no file can be read, as in pods: for each layer the rank of each expert.
    `windfarm plan --emit kuberay` writes it."""
    remote_model: str | None = None
    """Model name at the remote API, where it differs from `id`."""
    remote_key_env: str | None = None
    """Environment variable that holds the remote API's key."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Options handed to the engine as they are; the engine refuses the ones that it does not know."""

    @property
    def num_ranks(self) -> int:
        """Ranks of one copy of the model."""
        return self.data_parallel_size * self.tensor_parallel_size


class EmbeddingConfig(Section):
    """The embedding model: `args` of the application `embed`."""

    source: str = "embed"
    precision: Literal["auto", "bf16", "gguf", "int8", "fp32"] = "auto"
    """auto: bf16 or GGUF, whichever a short probe at the start finds faster; bf16 only where the CPU computes it."""
    threads: Annotated[int, Field(ge=1)] | None = None
    max_batch: Annotated[int, Field(ge=1)] = 32
    """Texts computed together."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    """How long a text waits for others to share its batch."""
    reranker: str | None = None
    """Folder of a cross-encoder that runs beside the embedding model, for `retrieval.rerank: embed`."""


class QdrantConfig(Section):
    url: str | None = None
    """A Qdrant server; none: the embedded engine in the data folder."""
    api_key_env: str | None = None
    nodes: list[str] = Field(default_factory=list)
    """URLs of the nodes of a Qdrant cluster: a deletion waits until none of them has any of it."""
    shards: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Shards of each collection that is made from now on, on a server; none: as the server does by itself."""
    replication_factor: Annotated[int, Field(ge=1, le=32)] = 1
    """Copies of each shard on different nodes of a server. Writes and deletions wait for all of them."""
    quantization: Literal["int8", "none"] = "int8"
    """How a server keeps the vectors that it compares first; results are compared again exactly."""


class WebConfig(Section):
    """What may be fetched for users who name a URL."""

    allowed: list[str] = Field(default_factory=list)
    """Addresses, networks (10.1.0.0/16) and names of hosts that may be fetched from although they are not public."""
    ports: list[Port] = [80, 443]
    """Ports of public hosts; what `allowed` lists has no limit of ports."""
    timeout_s: Annotated[float, Field(gt=0)] = 60
    """For one file with all its redirects."""
    max_redirects: Annotated[int, Field(ge=0, le=20)] = 5

    @field_validator("allowed")
    @classmethod
    def _is_readable(cls, entries: list[str]) -> list[str]:
        from services.web.addresses import Allowed

        Allowed.of(entries)
        return entries


class IngestionConfig(Section):
    max_file_mib: Annotated[float, Field(gt=0)] = 64
    parse_timeout_s: Annotated[float, Field(gt=0)] = 60
    parse_memory_mib: Annotated[int, Field(ge=128)] = 1536
    parse_cpu_s: Annotated[float, Field(gt=0)] | None = None
    """Processor time of one file; none: as much as parse_timeout_s."""
    parallel_parsers: Annotated[int, Field(ge=1)] = 1
    ocr_languages: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\+[A-Za-z0-9_]+)*$")] | None = None
    """Languages of the text recognition of scanned PDFs in tesseract's names (`eng+deu`); none: no recognition."""
    chunk_tokens: Annotated[int, Field(ge=16, le=512)] = 200
    chunk_overlap_tokens: Annotated[int, Field(ge=0)] = 32
    web: WebConfig = WebConfig()
    git_schemes: list[Literal["https", "ssh", "file"]] = ["https"]
    """How `windfarm sync` may read git repositories."""


class StoreConfig(Section):
    """Database and vector store: `args` of the application `store`."""

    qdrant: QdrantConfig = QdrantConfig()
    ingestion: IngestionConfig = IngestionConfig()


class ListenConfig(Section):
    host: str = "127.0.0.1"
    port: Port = 8000
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names beside localhost that may stand in a request while `host` is loopback (a proxy in front passes its own)."""
    balancer: Literal["kernel", "haproxy"] = "kernel"
    """How several processes of the endpoint share the port. kernel: each connection goes to one that is free.
    haproxy: each request goes to the one with the fewest, and HAProxy notices at once when one is gone."""


class RetrievalConfig(Section):
    top_k: Annotated[int, Field(ge=1, le=50)] = 3
    """Passages given to the model. Small models answer better from three than from five; large ones take more."""
    candidates: Annotated[int, Field(ge=1, le=1000)] = 50
    """Passages that each leg contributes before fusion."""
    fusion: Literal["rrf", "minmax", "dbsf"] = "dbsf"
    """How the meaning leg and the words leg are joined; dbsf was never below the better leg in any measured set."""
    dense_weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Weight of the meaning leg; the words leg has the rest."""
    rerank: str | None = None
    """Reads the best passages once more: the URL of a reranking service (`/rerank` as Cohere and Jina have it), or
    `embed` for the cross-encoder of the embedding application. For where `windfarm eval retrieval` shows a gain."""
    rerank_candidates: Annotated[int, Field(ge=1, le=100)] = 20
    """Passages that are reranked."""
    rerank_model: str | None = None
    """The model's name at the reranking service, where it wants one."""
    rerank_key_env: str | None = None
    """Environment variable that holds the reranking service's key."""
    evidence_threshold: Annotated[float, Field(ge=-1, le=1.2)] = 0.855
    """Evidence score (cosine of question and best passage, and what common words are worth) below which the answer is
    that the documents do not say. `windfarm tune` fits one to a collection."""


class ChatConfig(Section):
    default_max_tokens: Annotated[int, Field(ge=1)] = 512
    """Answer tokens where the client names no limit (never more than the context leaves)."""
    ask_model_to_cite: bool = False
    """Whether the prompt numbers the passages and asks for [n] marks: for models of some billion parameters. Small ones
    then write marks instead of an answer. The server attaches and verifies citations in both cases."""
    max_tool_rounds: Annotated[int, Field(ge=1, le=32)] = 6
    keep_alive_s: Annotated[float, Field(gt=0)] = 10
    """Seconds without a byte after which a stream gets a comment, so that proxies keep it open."""


class QueuesConfig(Section):
    """Requests that wait for a free slot of their model, in one endpoint process. Keys take turns by the tokens that
    they were served; beyond these numbers there is 429 or 503 with Retry-After, at once."""

    max_waiting: Annotated[int, Field(ge=0)] = 256
    """Of each model, and of searches."""
    max_waiting_flex: Annotated[int, Field(ge=0)] = 256
    """Of each model, of requests with `service_tier: flex`, which wait until no other waits."""
    wake_wait_s: Annotated[float, Field(gt=0)] = 600
    """How long a request waits for a model that was scaled to zero, and perhaps for a node, to be started again."""


class LimitsConfig(Section):
    """What one api key may do, where it has no value of its own (`windfarm key` gives it one); none: no limit."""

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Requests that begin within any 60 seconds."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompts and answers: those of running answers (as estimated) and of those that ended within the last 60
    seconds (as counted)."""
    concurrent_streams: Annotated[int, Field(ge=1)] | None = None
    """Answers under way at once, streamed or not."""
    when_unavailable: Literal["refuse", "allow"] = "refuse"
    """What happens to requests of limited keys while the limiter restarts: 503 with Retry-After, or no check."""


class StreamsConfig(Section):
    """An answer whose replica is lost goes on at another one, after the last token that was sent."""

    stall_s: Annotated[float, Field(gt=0)] = 20
    """Seconds without a token, after the first one, after which a replica counts as hung where there is another."""
    max_moves: Annotated[int, Field(ge=0)] = 2
    """Moves of one answer: its request may be what kills the replicas. 0: an answer ends with its replica."""
    move_wait_s: Annotated[float, Field(ge=0)] = 20
    """How long an answer waits for a replica that can take it, for example one that restarts."""
    relay_drain_s: Annotated[float, Field(ge=0, le=3600)] = 120
    """How long answers under way may still take where their process of the endpoint is replaced; then they are cut."""


class PlatformConfig(Section):
    """Public endpoint, chat, retrieval and page: `args` of the application `platform`."""

    listen: ListenConfig = ListenConfig()
    default_model: str = "tiny"
    embedding_model: str = "embed"
    """The name under which clients ask for vectors."""
    max_body_mib: Annotated[float, Field(gt=0)] = 80
    upstream_connect_timeout_s: Annotated[float, Field(gt=0)] = 5
    retrieval: RetrievalConfig = RetrievalConfig()
    chat: ChatConfig = ChatConfig()
    streams: StreamsConfig = StreamsConfig()
    queues: QueuesConfig = QueuesConfig()
    limits: LimitsConfig = LimitsConfig()


class AppConfig(Section):
    """Everything that `ray_config.yaml` may say below `applications[].args`."""

    store: StoreConfig = StoreConfig()
    embed: EmbeddingConfig = EmbeddingConfig()
    models: dict[str, ModelConfig] = Field(default_factory=dict)
    platform: PlatformConfig = PlatformConfig()


class Environment(Section):
    """What comes from the machine and not from the file. Read once per process by `read_environment`."""

    home: Path
    """The data folder, `WINDFARM_HOME`."""
    database_url: str
    """SQLAlchemy URL, `WINDFARM_DATABASE_URL`; default: SQLite in the data folder."""
    internal_secret: str
    """`WINDFARM_INTERNAL_SECRET`: made anew at each start; what internal ports demand."""
    internal_host: str = "127.0.0.1"
    """`WINDFARM_INTERNAL_HOST`: the address of this node that internal ports (models, page) listen on."""
    public_namespace: Path | None = None
    """The network namespace in which the public port is opened too, where this process runs in one of its own."""
    ports: Path | None = None
    """`WINDFARM_PORTS`: the Unix socket at which windfarm's own process lends the public port."""
    public_url: str | None = None
    """`WINDFARM_PUBLIC_URL`: where the page reaches the public endpoint that is not on its own machine."""
    qdrant_url: str | None = None
    """`WINDFARM_QDRANT_URL`: wins over `store.qdrant.url`."""
    listen_host: str | None = None
    """`WINDFARM_HOST`: wins over `platform.listen.host`."""
    listen_port: int | None = None
    """`WINDFARM_PORT`: wins over `platform.listen.port`."""
    threads: int | None = None
    """`WINDFARM_THREADS`: CPU threads of each engine where the file names none."""
