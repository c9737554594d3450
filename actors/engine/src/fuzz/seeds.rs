//! Small files that are (nearly) sound, for the fuzzer to change.

use serde_json::{Map, Value, json};

use ingle_protocol::NodeId;
use ingle_protocol::registry::{Entry, ModelType, NewModel, Origin, Registry, Stamp, Value as Parameter};
use ingle_protocol::wire::encode;

use super::parts;
use crate::gguf::tiny::{Meta, Sizes, Tiny, llama};

/// A name and the bytes.
type Seed = (String, Vec<u8>);

/// The seeds of each target.
pub fn all() -> Vec<(&'static str, Vec<Seed>)> {
    vec![
        ("gguf", ggufs()),
        ("model", models()),
        ("safetensors", safetensors()),
        ("folder", folders()),
        ("tokenizer", tokenizers()),
        ("template", templates()),
        ("wire", frames()),
        ("registry", registries()),
    ]
}

/// The smallest sizes that the CPU's kernels take, and few tokens.
fn small(family: &str) -> Tiny {
    let sizes = Sizes {
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_size: 16,
        feed_forward: 32,
        context_length: 64,
        own_output: false,
    };
    let mut tiny = llama(sizes);
    tiny.metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    for (key, value) in &mut tiny.metadata {
        *key = key.replace("llama.", &format!("{family}."));
        if key == "general.architecture" {
            *value = Meta::Text(family.into());
        }
    }
    for tensor in &mut tiny.tensors {
        if tensor.name == "token_embd.weight" {
            tensor.dimensions[1] = 4;
            tensor.bytes.truncate(4 * 4 * 32);
        }
    }
    let zeros = |count: u64| vec![0.0; count as usize];
    let mut put = |name: &str, dimensions: &[u64]| {
        tiny.tensor_f32(name, dimensions, &zeros(dimensions.iter().product()));
    };
    match family {
        "qwen2" => {
            put("blk.0.attn_q.bias", &[32]);
            put("blk.0.attn_k.bias", &[16]);
            put("blk.0.attn_v.bias", &[16]);
        }
        "qwen3" | "gemma3" => {
            put("blk.0.attn_q_norm.weight", &[16]);
            put("blk.0.attn_k_norm.weight", &[16]);
        }
        "phi3" => {
            put("blk.0.attn_qkv.weight", &[32, 64]);
            put("rope_factors_long.weight", &[8]);
            put("rope_factors_short.weight", &[8]);
        }
        _ => put("rope_freqs.weight", &[8]),
    }
    if family == "gemma3" {
        put("blk.0.post_attention_norm.weight", &[32]);
        put("blk.0.post_ffw_norm.weight", &[32]);
        tiny.meta("gemma3.attention.sliding_window", Meta::U32(8));
        tiny.meta("gemma3.attention.key_length", Meta::U32(16));
    }
    if family == "phi3" {
        for part in ["attn_q", "attn_k", "attn_v", "ffn_gate"] {
            tiny.without(&format!("blk.0.{part}.weight"));
        }
        for tensor in &mut tiny.tensors {
            if tensor.name == "blk.0.ffn_up.weight" {
                tensor.dimensions[1] = 64;
                tensor.bytes.resize(4 * 32 * 64, 0);
            }
        }
        tiny.meta("phi3.rope.scaling.type", Meta::Text("longrope".into()));
        tiny.meta("phi3.rope.scaling.original_context_length", Meta::U32(16));
    }
    tiny
}

const FAMILIES: [&str; 5] = ["llama", "qwen2", "qwen3", "gemma3", "phi3"];

/// Bytes of a file up to its weights.
fn head(tiny: &Tiny) -> Vec<u8> {
    let weights: usize = tiny.tensors.iter().map(|tensor| tensor.bytes.len().next_multiple_of(32)).sum();
    let last = tiny.tensors.last().map_or(0, |tensor| tensor.bytes.len().next_multiple_of(32) - tensor.bytes.len());
    let mut bytes = tiny.bytes();
    bytes.truncate(bytes.len() + last - weights);
    bytes
}

fn models() -> Vec<Seed> {
    let mut seeds: Vec<Seed> = FAMILIES.iter().map(|family| (family.to_string(), head(&small(family)))).collect();
    // Other formats: F16, Q8_0 and Q4_1 have rows of 32.
    for (name, format, block, bytes) in [("f16", 1, 1, 2), ("q8_0", 8, 32, 34), ("q4_1", 3, 32, 20)] {
        let mut tiny = small("llama");
        for tensor in tiny.tensors.iter_mut().filter(|tensor| tensor.dimensions.len() == 2) {
            tensor.format = format;
            tensor.bytes = vec![0; tensor.dimensions.iter().product::<u64>() as usize / block * bytes];
        }
        seeds.push((name.into(), head(&tiny)));
    }
    seeds
}

fn ggufs() -> Vec<Seed> {
    let mut seeds = models();
    let mut tiny = Tiny::default();
    tiny.meta("a", Meta::U64(1 << 40))
        .meta("b", Meta::F32(0.5))
        .meta("c", Meta::Bool(true))
        .meta("d", Meta::Texts(vec!["x".into(), "yz".into()]))
        .meta("e", Meta::I32s(vec![-1, 2]))
        .meta("f", Meta::F32s(vec![0.5]))
        .meta("general.alignment", Meta::U32(32));
    tiny.tensor_f32("t", &[2, 2], &[1.0; 4]).tensor_f32("u", &[3], &[1.0; 3]);
    let bytes = tiny.bytes();
    let mut second = bytes.clone();
    second[4] = 2;
    seeds.extend([("every_kind".into(), bytes), ("version_2".into(), second)]);
    seeds
}

fn safetensors_head() -> Vec<u8> {
    let head = json!({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
        "d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [40, 40]},
    });
    head.to_string().into_bytes()
}

fn safetensors() -> Vec<Seed> {
    let head = safetensors_head();
    let file = [&[0][..], &(head.len() as u64).to_le_bytes(), &head, &[0; 40]].concat();
    let map =
        json!({"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}});
    vec![("file".into(), file), ("index".into(), [&[1], map.to_string().as_bytes()].concat())]
}

/// Parts with zero bytes between them.
fn joined(parts: &[&str]) -> Vec<u8> {
    parts.join("\0").into_bytes()
}

fn folders() -> Vec<Seed> {
    let config = |kind: &str| {
        json!({
            "architectures": [kind], "model_type": "m", "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 12,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 9,
        })
    };
    let tensors = |names: &[(&str, &[usize])]| {
        let mut at = 0;
        let entry = |(name, shape): &(&str, &[usize])| {
            let from = at;
            at += 4 * shape.iter().product::<usize>();
            (name.to_string(), json!({"dtype": "F32", "shape": shape, "data_offsets": [from, at]}))
        };
        Value::Object(names.iter().map(entry).collect::<Map<_, _>>()).to_string()
    };
    let weights = tensors(&[
        ("model.embed_tokens.weight", &[12, 16]),
        ("model.norm.weight", &[16]),
        ("model.layers.0.input_layernorm.weight", &[16]),
        ("model.layers.0.self_attn.q_proj.weight", &[16, 16]),
        ("model.layers.0.self_attn.k_proj.weight", &[8, 16]),
        ("model.layers.0.mlp.down_proj.weight", &[16, 32]),
    ]);
    let bpe = json!({
        "added_tokens": [{"id": 8, "content": "<|x|>", "special": false}, {"id": 9, "content": "<end>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": true},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<end>"}}, {"Sequence": {}}]},
        "model": {"type": "BPE", "byte_fallback": false, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"], "a b"]},
    });
    let mut piece = bpe.clone();
    piece["model"]["byte_fallback"] = true.into();
    piece["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first"});
    let settings =
        json!({"eos_token": "<end>", "bos_token": {"content": "<s>"}, "chat_template": "{{ x }}"}).to_string();
    let with_rope = |kind: &str, rope: Value| {
        let mut config = config(kind);
        config["rope_scaling"] = rope;
        config.to_string()
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32});
    let long = json!({"type": "longrope", "long_factor": [1.0, 2.0], "short_factor": [1.0]});
    let word = json!({"normalizer": {"type": "BertNormalizer", "lowercase": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1, "##b": 2}}});
    let bert =
        tensors(&[("embeddings.word_embeddings.weight", &[12, 16]), ("encoder.layer.0.output.dense.bias", &[16])]);
    let (bpe, piece) = (bpe.to_string(), piece.to_string());
    vec![
        ("llama".into(), joined(&[&config("LlamaForCausalLM").to_string(), &bpe, &settings, &weights])),
        ("llama3".into(), joined(&[&with_rope("LlamaForCausalLM", llama3), &bpe, &settings, &weights])),
        ("phi3".into(), joined(&[&with_rope("Phi3ForCausalLM", long), &piece, "", &weights])),
        ("bert".into(), joined(&[&config("BertModel").to_string(), &word.to_string(), "", &bert])),
    ]
}

fn tokenizers() -> Vec<Seed> {
    let bytes = "\u{1}a\n\u{1}b\n\u{1}Ġ\n\u{1}ab\n\u{3}<e>\n\u{4}<x>\n\u{1}Ċ\n\u{1}é\n";
    let pieces = "\u{2}<unk>\n\u{3}<s>\n\u{3}</s>\n\u{6}<0x41>\n\u{1}\u{2581}\n\u{1}\u{2581}a\n\u{1}ab\n\u{1}a\n\u{1}b\n\u{4}  \n";
    let words = "\u{3}[UNK]\n\u{3}[CLS]\n\u{3}[SEP]\n\u{1}\u{2581}a\n\u{1}b\n\u{1}\u{2581}hello\n";
    let seed = |settings: &[u8], parts: [&str; 3]| [settings, b"\0", &joined(&parts)].concat();
    let text = "ab <x>a b\n\n <e> A\u{e9}\u{301}12 </s>it's";
    let mut seeds: Vec<Seed> = (1..7u8)
        .map(|n| (format!("gpt2_{n}"), seed(&[3, n | 0x80, n * 37, 4, 255, 255], [bytes, "a b\n", text])))
        .collect();
    seeds.push(("llama".into(), seed(&[1, 0x86, 0x18, 1, 2], [pieces, "", text])));
    seeds.push(("phi3".into(), seed(&[1, 0x86, 0x81, 255], [pieces, "", text])));
    seeds.push(("bert".into(), seed(&[2, 6, 8, 255, 255, 255, 2, 1], [words, "", "Hello ab \u{e9} b!"])));
    debug_assert!(seeds.iter().all(|(_, seed)| parts::<4>(seed)[3].len() > 8));
    seeds
}

fn templates() -> Vec<Seed> {
    let file = include_str!("../../tests/fixtures/chat_templates.json");
    let file: Value = serde_json::from_str(file).unwrap_or_default();
    let given = file["templates"].as_array().into_iter().flatten();
    let texts = given.filter_map(|template| Some((template["name"].as_str()?, template["source"].as_str()?)));
    // Longer ones have more of the same.
    let texts = texts.filter(|(_, source)| source.len() < 3_000);
    let own = [
        ("loop", "{% for m in messages %}{{ loop.index0 }}{{ m['role'] + m.content | trim }}{% endfor %}"),
        (
            "names",
            "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ messages[1:] | tojson(indent=2) }}",
        ),
        ("macro", "{% macro f(x) %}{{ x.strip().split(' ')[0] }}{% endmacro %}{{ f(messages[0].content) }}"),
        ("date", "{{ strftime_now('%Y-%m-%d') }}{% if tools is defined %}{{ tools | length }}{% endif %}"),
        ("generation", "{%- generation %}{{ raise_exception('no') }}{%- endgeneration -%}"),
    ];
    let short = |name: &str| name.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect::<String>();
    let seed =
        |(name, text): (&str, &str)| (short(name), joined(&[text, " Hi <|x|>\n", r#"{"tools":[{"a":1}],"name":"f"}"#]));
    texts.chain(own).map(seed).collect()
}

/// The frames whose bytes stand for ever, kind and body.
fn frames() -> Vec<Seed> {
    let golden = include_str!("../../../../protocol/golden/v2.txt");
    let older = include_str!("../../../../protocol/golden/v1.txt").lines().filter(|line| !golden.contains(line));
    let bytes = |hex: &str| -> Vec<u8> {
        let digits = hex.as_bytes().chunks(2).filter_map(|pair| std::str::from_utf8(pair).ok());
        digits.filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect()
    };
    let newest = golden.lines().map(|line| ("", line));
    let mut seeds: Vec<Seed> = newest
        .chain(older.map(|line| ("_v1", line)))
        .filter_map(|(version, line)| Some((version, line.split_once(' ')?)))
        .map(|(version, (name, hex))| {
            let frame = bytes(hex);
            (format!("{name}{version}"), frame.iter().take(1).chain(frame.iter().skip(5)).copied().collect())
        })
        .collect();
    let whole = golden.lines().filter_map(|line| line.split_once(' ')).map(|(_, hex)| bytes(hex)).next();
    seeds.extend(whole.map(|frame| ("frame".to_string(), frame)));
    seeds
}

/// Entries of nodes that did not hear each other, each behind its length; and what three nodes did.
fn registries() -> Vec<Seed> {
    let at = |node: u8, counter| Stamp { counter, node: NodeId([node; 16]) };
    let new = NewModel {
        name: "m".into(),
        kind: ModelType::Llm,
        origin: Origin::Source("hf:a/b/c.gguf".into()),
        sha256: None,
        keep_alive: Some(60),
        parameters: [("threads".to_owned(), Parameter::Number(2))].into(),
        pins: vec!["tower".into()],
    };
    let mut one = Registry::default();
    one.add(new.clone(), at(1, 1_700_000_000_000)).unwrap_or_default();
    let (mut other, mut third) = (one.clone(), one.clone());
    one.set_parameters("m", &[("threads".into(), None)].into(), at(1, 1_700_000_000_005)).unwrap_or_default();
    one.set_default(Some("m".into()), at(1, 1_700_000_000_006)).unwrap_or_default();
    other.set_pins("m", &["attic".into()], at(2, 1_700_000_000_005)).unwrap_or_default();
    other.remove("m", at(2, 1_700_000_000_007)).unwrap_or_default();
    third.remove("m", at(3, 1_700_000_000_003)).unwrap_or_default();
    third.add(new, at(3, 1_700_000_000_009)).unwrap_or_default();
    let joined = |entries: Vec<Entry>| {
        let mut bytes = vec![0];
        for frame in entries.iter().filter_map(|entry| encode(entry).ok()) {
            bytes.extend((frame.body.len() as u16).to_le_bytes());
            bytes.extend_from_slice(&frame.body);
        }
        bytes
    };
    let firsts = [&one, &other, &third].map(|registry| registry.entries().next());
    let changes = |changes: &[[u8; 4]]| [[1].as_slice(), &changes.concat()].concat();
    vec![
        ("three_sides".into(), joined(firsts.into_iter().flatten().collect())),
        ("model_and_default".into(), joined(one.entries().collect())),
        ("removed".into(), joined(other.entries().take(1).collect())),
        (
            "one_removes_what_the_other_changes".into(),
            changes(&[[0, 0, 40, 9], [1, 7, 0, 0], [0, 1, 0, 3], [1, 2, 6, 1]]),
        ),
        (
            "everything".into(),
            changes(&[
                [0, 0, 200, 9],
                [0, 6, 3, 9],
                [1, 7, 0, 0],
                [2, 7, 0, 0],
                [0, 3, 1, 9],
                [1, 4, 9, 99],
                [2, 5, 8, 1],
                [2, 1, 0, 0],
                [5, 7, 0, 0],
                [0, 0, 64, 0],
            ]),
        ),
    ]
}
