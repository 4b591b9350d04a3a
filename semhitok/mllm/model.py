"""The unified multimodal language model: a decoder-only LLM that reads and writes text ids and flat image ids.

text ids ------- LLM's embedding --------------+                +-- text head --------------+
image ids h -> code i, sub-code j              |                |                           |
   sem code i -- MLP --+                       +-> LLM's trunk -+-- image head over K*m ids +-> one softmax
   pix code i, j MLP --+-- concatenated -------+                |                           |
begin, end, resolution -- embedding -----------+                +-- special head -----------+

Source: SemHiTok (arXiv 2503.06764): one vocabulary, next-token prediction, dual-MLP adapter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from semhitok.mllm.loss import IGNORE, group_cross_entropy, group_logsumexp, linear_cross_entropy
from semhitok.mllm.modules import Codebooks, DualAdapter, Rows
from semhitok.mllm.output import OutputRule, check_logits, output_rule
from semhitok.tokenizer import Features, SemHiTok
from semhitok.vocabulary import Vocabulary, codebook_hash

HEADS = ("flat", "hierarchical")


class UnifiedMLLMConfig(PreTrainedConfig):
    """Sizes of a `UnifiedMLLM`.

    Args:
        text_config: the LLM's config, or its `to_dict()`; image ids begin at its `vocab_size`.
        num_codes: K, semantic codes of the image tokenizer.
        num_sub_codes: m, sub-codes of each; their mean with `adaptive`.
        sem_dim: Ds, dimension of semantic codes.
        pix_dim: Dp, dimension of sub-codes.
        grid_size: ids along one side of an image.
        image_size: pixels along one side of an image.
        resolution_id: a special id for `image_size` follows begin of image.
        codebook_hash: hash of the codebooks in the model; None if it has none.
        head: "flat", one row for every id; or "hierarchical", code i first, then sub-code j from the rows of i.
        adaptive: the sub-codebooks differ in size; the model keeps the sizes with its codebooks.
        logit_scale: multiplies all logits, as the LLM scales its own; `from_parts` sets it and `logit_softcap`.
        logit_softcap: logits x become logit_softcap * tanh(x / logit_softcap); None leaves them as they are.
    """

    model_type = "semhitok_mllm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_codes: int = 16384,
        num_sub_codes: int = 12,
        sem_dim: int = 32,
        pix_dim: int = 32,
        grid_size: int = 16,
        image_size: int = 256,
        resolution_id: bool = False,
        codebook_hash: str | None = None,
        head: str = "flat",
        adaptive: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:  # transformers compares configs with their default
            text_config = AutoConfig.for_model("qwen2")
        elif isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        sizes = {
            "num_codes": num_codes, "num_sub_codes": num_sub_codes, "sem_dim": sem_dim, "pix_dim": pix_dim,
            "grid_size": grid_size, "image_size": image_size,
        }  # fmt: skip
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
            setattr(self, name, value)
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        self.adaptive = adaptive
        self.logit_scale, self.logit_softcap = logit_scale, logit_softcap
        self.text_config = text_config
        self.resolution_id = resolution_id
        self.codebook_hash = codebook_hash
        self.head = head
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def positions(self) -> int | None:
        """The most ids that a row of the LLM may have; None if it says nothing."""
        found: int | None = getattr(self.text_config, "max_position_embeddings", None)
        return found

    @property
    def vocabulary(self) -> Vocabulary:
        """All ids of the model. Image ids follow the rows of the LLM's embedding, of which some may be unused.

        Without adaptive sizes, which a config does not have; see `UnifiedMLLM.vocabulary`.
        """
        sizes = (self.image_size,) if self.resolution_id else ()
        return Vocabulary(self.num_codes, self.num_sub_codes, self.text_config.vocab_size, self.codebook_hash, sizes)


class UnifiedMLLM(PreTrainedModel, GenerationMixin):
    """A causal LM of transformers over text ids and flat image ids; `generate`, saving and PEFT work as usual.

    Build one with `from_parts`, or without codebooks from a `UnifiedMLLMConfig`. Ids are those of `vocabulary`.
    With LoRA, train the new parts in full: `modules_to_save=UnifiedMLLM.new_modules(config)`.
    """

    config: UnifiedMLLMConfig
    config_class = UnifiedMLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["codebooks.sem", "codebooks.pix"]  # noqa: RUF012

    def __init__(self, config: UnifiedMLLMConfig) -> None:
        super().__init__(config)
        vocabulary = config.vocabulary
        width, K, m = config.text_config.hidden_size, config.num_codes, config.num_sub_codes
        self.model = AutoModel.from_config(config.text_config)
        self.rule = OutputRule(config.logit_scale, config.logit_softcap)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"text_head.weight": f"model.{name}.weight"}
        self.codebooks = Codebooks(config)
        self.adapter = DualAdapter(config.sem_dim, config.pix_dim, width)
        self.special_embedding = nn.Embedding(vocabulary.num_special, width)
        self.text_head = nn.Linear(width, vocabulary.text_size, bias=False)
        # In the order of flat ids, also with adaptive sizes. The hierarchical head scores sub-codes within their code.
        self.image_head = Rows(K, m, width)
        self.semantic_head = Rows(K, width) if config.head == "hierarchical" else None
        self.special_head = Rows(vocabulary.num_special, width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Rows):
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))

    @staticmethod
    def new_modules(config: UnifiedMLLMConfig) -> list[str]:
        """Names of the modules that the LLM does not have; they start untrained."""
        names = ["adapter", "special_embedding", "image_head", "special_head"]
        return names + ["semantic_head"] if config.head == "hierarchical" else names

    @classmethod
    def from_parts(
        cls,
        llm: str | PreTrainedConfig | PreTrainedModel,
        image_tokenizer: SemHiTok,
        *,
        head: str = "flat",
        resolution_id: bool = False,
        **kwargs: Any,
    ) -> UnifiedMLLM:
        """Build a model from an LLM and an image tokenizer, whose codebooks it copies. The new parts are random.

        Args:
            llm: folder or Hub name of a causal LM, or the model (its weights are used, not copied), or a config for
                random weights.
            image_tokenizer: the tokenizer of the images.
            head: see `UnifiedMLLMConfig`.
            resolution_id: see `UnifiedMLLMConfig`.
            kwargs: of `AutoModelForCausalLM.from_pretrained` or `from_config`, such as dtype or attn_implementation.

        Raises:
            ValueError: the LLM's head has a bias, its number of rows is not that of the embedding, or their width not
                that of the hidden states; or logits are computed in a way that is not supported (see
                `semhitok.mllm.output`).
            OSError: `llm` cannot be read or fetched.
        """
        if isinstance(llm, str):
            llm = AutoModelForCausalLM.from_pretrained(llm, **kwargs)
        elif isinstance(llm, PreTrainedConfig):
            llm = AutoModelForCausalLM.from_config(llm, **kwargs)
        assert isinstance(llm, PreTrainedModel)
        embedding: Any = llm.get_input_embeddings()
        lm_head: Any = llm.get_output_embeddings()
        bias = getattr(lm_head, "bias", None)
        if lm_head is None or bias is not None or lm_head.weight.shape != embedding.weight.shape:
            raise ValueError(f"llm: expected an output head without bias as large as the embedding, got {lm_head}")
        if embedding.weight.shape[1] != llm.config.hidden_size:
            got = f"{embedding.weight.shape[1]} in {type(llm).__name__}"
            raise ValueError(f"llm: expected embeddings as wide as hidden states, {llm.config.hidden_size}, got {got}")
        sizes = image_tokenizer.config
        config = UnifiedMLLMConfig(
            llm.config,
            sizes.num_codes, sizes.num_sub_codes, sizes.sem_dim, sizes.pix_dim, sizes.grid_size, sizes.image_size,
            resolution_id, image_tokenizer.codebook_hash, head, sizes.adaptive, *output_rule(llm.config),
        )  # fmt: skip
        # The LLM's parts are built without memory and then replaced.
        with torch.device("meta"):
            model = cls(config)
        model.model, model.text_head = llm.base_model, lm_head
        for name, module in model.named_children():
            if name not in ("model", "text_head"):
                module.to_empty(device=embedding.weight.device)
                if name != "codebooks":
                    module.to(embedding.weight.dtype)
                    module.apply(model._init_fresh)
        model.codebooks.sem.copy_(image_tokenizer.quantizer.semantic.codebook)
        model.codebooks.pix.copy_(image_tokenizer.quantizer.pix_codebook)
        if model.codebooks.offsets is not None and image_tokenizer.quantizer.offsets is not None:
            model.codebooks.offsets.copy_(image_tokenizer.quantizer.offsets)
        model.tie_weights()
        if llm.generation_config is not None:
            model.generation_config = llm.generation_config
        check_logits(llm, lambda ids: model(ids).logits)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; also raises ValueError if the codebooks do not have the hash in the config."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        books = model.codebooks
        if model.config.codebook_hash is not None and not books.sem.is_meta:
            model.config.vocabulary.check_hash(codebook_hash(books.sem, books.pix, books.offsets))
        return loaded

    @property
    def vocabulary(self) -> Vocabulary:
        """All ids of the model, with the hash of its codebooks and, if sizes are adaptive, their offsets."""
        offsets = self.codebooks.offsets
        if offsets is None:
            return self.config.vocabulary
        return replace(self.config.vocabulary, offsets=tuple(offsets.tolist()))

    def get_output_embeddings(self) -> nn.Module:
        """The text head only."""
        return self.text_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """The LLM's embedding. Other than in transformers it keeps its size, which all image ids depend on.

        Raises:
            ValueError: another number of rows. Nothing is changed.
        """
        rows = self.config.text_config.vocab_size
        number, multiple = new_num_tokens or rows, pad_to_multiple_of or 1
        if (number := -(-number // multiple) * multiple) != rows:
            problem = f"expected {rows}, since image ids follow the text ids, got {number}"
            raise ValueError(f"new_num_tokens: {problem}; resize the LLM before UnifiedMLLM.from_parts")
        embedding: Any = self.get_input_embeddings()
        return embedding

    def embed(self, input_ids: Tensor, image_features: Features | None = None) -> Tensor:
        """Ids [B, T] -> the LLM's input [B, T, width].

        Args:
            input_ids: int64, ids of `vocabulary`.
            image_features: code vectors of the image ids in `input_ids`, in order, [..., Ds] and [..., Dp], as returned
                by `SemHiTok.features`. The image ids then only mark the positions. With None they are looked up.

        Raises:
            ValueError: ids out of range, a wrong number or size of vectors, or a model without codebooks.
        """
        vocabulary, config = self.config.vocabulary, self.config
        if not torch.compiler.is_compiling():
            low, high = (int(x) for x in torch.aminmax(input_ids)) if input_ids.numel() else (0, 0)
            if low < 0 or high >= vocabulary.size:
                got = low if low < 0 else high
                raise ValueError(f"input_ids: expected ids in [0, {vocabulary.size}), got {got}")
        text = input_ids < vocabulary.text_size
        special = input_ids >= vocabulary.begin_of_image
        image = ~text & ~special
        embedded = self.model.get_input_embeddings()(torch.where(text, input_ids, 0))
        of_special = self.special_embedding((input_ids - vocabulary.begin_of_image).clamp_min(0))
        embedded = torch.where(special.unsqueeze(-1), of_special.to(embedded.dtype), embedded)
        if torch.compiler.is_compiling():  # shapes must not depend on ids: every position gets a vector
            if image_features is None:
                of_image = self.adapter(*self.codebooks(torch.where(image, input_ids - vocabulary.text_size, 0)))
                return torch.where(image.unsqueeze(-1), of_image.to(embedded.dtype), embedded)
        elif image_features is None:
            codes = input_ids[image] - vocabulary.text_size
            if len(codes) and config.codebook_hash is None:
                raise ValueError("input_ids: expected a model with codebooks for image ids, got one without")
            image_features = self.codebooks(codes)
        else:
            self._check_features(image_features, int(image.sum()))
        semantic, pixel = image_features
        of_image = self.adapter(semantic.reshape(-1, config.sem_dim), pixel.reshape(-1, config.pix_dim))
        return embedded.masked_scatter(image.unsqueeze(-1), of_image.to(embedded.dtype))

    def _check_features(self, image_features: Features, count: int) -> None:
        """Raise ValueError unless there are `count` vectors of both kinds."""
        semantic, pixel = image_features
        for name, x, dim in (("semantic", semantic, self.config.sem_dim), ("pixel", pixel, self.config.pix_dim)):
            if x.shape[-1] != dim or x.numel() != count * dim:
                problem = f"expected {count} vectors of dimension {dim}, got {list(x.shape)}"
                raise ValueError(f"image_features.{name}: {problem}")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_features: Features | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        reduce: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The loss with `labels`, the logits without: never both, as the loss does not compute all logits at once.

        Args:
            input_ids: [B, T] int64, ids of `vocabulary`; or pass `inputs_embeds` [B, T, width] from `embed`.
            attention_mask: [B, T], 0 where padded; None for packed samples (`semhitok.mllm.packing`).
            position_ids: [B, T]. Without `attention_mask` and cache, a new sample begins wherever positions restart;
                samples do not attend to each other.
            image_features: see `embed`.
            labels: [B, T] ids, or -100 for no loss; position t predicts the label at t + 1.
            use_cache: None means False, other than in transformers' own models, as a cache would disable packing.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or indices of positions.
            num_items_in_batch: divides the sum of the losses; the number of labels by default.
            reduce: False gives the loss of each label in place of their mean.

        Returns:
            with `labels`, `loss`, fp32: the mean over labels, or [B * (T - 1)], 0 where -100; otherwise `logits`
            [B, T, vocabulary.size].

        Raises:
            ValueError: see `embed`; both or neither of `input_ids` and `inputs_embeds`; labels out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids or inputs_embeds, got both or neither")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, image_features)
        elif image_features is not None:
            raise ValueError("image_features: expected None beside inputs_embeds, got vectors")
        kwargs.pop("return_dict", None)
        use_cache = bool(use_cache) or past_key_values is not None
        outputs = self.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            labels = labels[:, 1:].flatten()
            loss = self.token_losses(hidden[:, :-1].flatten(0, 1), labels)
            if reduce:
                count = (labels != IGNORE).sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
                loss = loss.sum() / count
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(hidden[:, keep])
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [..., width] -> logits [..., vocabulary.size], for one softmax over all ids."""
        text, image, special = self._rows()
        hidden, cap = self.rule.scale_hidden(hidden), self.rule.cap_logits
        rows, grouping = self.image_head.weight, self.codebooks.grouping
        of_image = hidden @ rows.reshape(-1, hidden.shape[-1]).T
        if self.semantic_head is None:
            of_image = cap(of_image)
        else:
            # log p(i, j) = log p(i) + log p(j | i), up to a constant.
            wide = of_image.to(torch.promote_types(of_image.dtype, torch.float32))
            if grouping.offsets is None:
                within = wide.unflatten(-1, rows.shape[:2]).log_softmax(-1)
                of_image = (cap(hidden @ image.T).unsqueeze(-1) + within).flatten(-2)
            else:
                of_image = wide + grouping.repeat(cap(hidden @ image.T) - group_logsumexp(wide, grouping.offsets))
        return torch.cat([cap(hidden @ text.T), of_image, cap(hidden @ special.T)], dim=-1)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Last hidden states [N, width] and the ids [N] to predict -> cross-entropy [N] in fp32, 0 where -100."""
        vocabulary, hidden = self.config.vocabulary, self.rule.scale_hidden(hidden)
        if self.semantic_head is None:
            return linear_cross_entropy(hidden, self._rows(), targets, self.rule.softcap)
        # In the outer softmax, codes i stand in place of the image ids.
        image = (targets >= vocabulary.text_size) & (targets < vocabulary.begin_of_image)
        codes = torch.where(image, targets - vocabulary.text_size, 0)
        grouping = self.codebooks.grouping
        code, sub = grouping.split(codes)
        shorter = vocabulary.num_flat_codes - vocabulary.num_codes
        coarse = torch.where(image, vocabulary.text_size + code, targets)
        coarse = torch.where(targets >= vocabulary.begin_of_image, targets - shorter, coarse)
        rows, bounds = self.image_head.weight.flatten(0, 1), grouping.bounds(hidden.device)
        within = group_cross_entropy(hidden, rows, code, torch.where(image, sub, IGNORE), bounds)
        return linear_cross_entropy(hidden, self._rows(), coarse, self.rule.softcap) + within

    def _rows(self) -> list[Tensor]:
        """Rows of the outer softmax, [ids, width] each: text; flat ids or codes i; special."""
        of_image: Any = self.image_head if self.semantic_head is None else self.semantic_head
        heads: list[Any] = [self.text_head, of_image, self.special_head]
        for head in heads:
            if hasattr(head, "lora_A"):
                raise ValueError("heads: expected whole weights, got LoRA; name them in modules_to_save instead")
        text, image, special = (head.weight for head in heads)
        return [text, image.flatten(0, -2), special]

    def _init_fresh(self, module: nn.Module) -> None:
        """`_init_weights`, also for weights that are marked as initialised already."""
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        self._init_weights(module)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Repeat every row `expand_size` times, for beams and several sequences; vectors of images with their row."""
        features = kwargs.pop("image_features", None)
        if features is not None and expand_size > 1:
            vocabulary = self.config.vocabulary
            image = (input_ids >= vocabulary.text_size) & (input_ids < vocabulary.begin_of_image)
            counts = image.sum(1).tolist()
            self._check_features(features, sum(counts))
            rows = zip(*(x.reshape(-1, x.shape[-1]).split(counts) for x in features), strict=True)
            repeated = zip(*(row for row in rows for _ in range(expand_size)), strict=True)
            features = Features(*map(torch.cat, repeated))
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, kwargs if features is None else {**kwargs, "image_features": features}

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Pass vectors of a prompt's images with the prompt only; later steps find them in the cache."""
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            kwargs.pop("image_features", None)
        parent: Any = super()
        return parent.prepare_inputs_for_generation(*args, **kwargs)
