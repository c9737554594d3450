use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::dequantize::Format;
use crate::gguf::Gguf;
use crate::gguf::tiny::numbers;
use crate::quantize::Conversion;

const EMBEDDING: usize = 16;
const TOKENS: usize = 12;

/// A folder with a one-layer Llama of two heads, whose weights are as `numbers` gives them.
fn llama() -> (TempDir, Value, Value) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": EMBEDDING,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": TOKENS,
        "eos_token_id": 9,
    });
    let vocabulary: serde_json::Map<String, Value> =
        ["a", "b", "c", "Ġ", "ab"].iter().zip(0..).map(|(token, id)| (token.to_string(), json!(id))).collect();
    let tokenizer = json!({
        "added_tokens": [{"id": 8, "content": "<|x|>", "special": false}, {"id": 9, "content": "<end>", "special": true},
                         {"id": 10, "content": "▁▁", "special": false}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": null,
        "model": {"type": "BPE", "byte_fallback": false, "vocab": vocabulary, "merges": [["a", "b"], ["Ġ", "c d"]]},
    });
    let folder = tempfile::tempdir().unwrap();
    let narrow = EMBEDDING / 2;
    let tensors = [
        ("model.embed_tokens.weight", vec![TOKENS, EMBEDDING]),
        ("model.norm.weight", vec![EMBEDDING]),
        ("model.layers.0.input_layernorm.weight", vec![EMBEDDING]),
        ("model.layers.0.post_attention_layernorm.weight", vec![EMBEDDING]),
        ("model.layers.0.self_attn.q_proj.weight", vec![EMBEDDING, EMBEDDING]),
        ("model.layers.0.self_attn.k_proj.weight", vec![narrow, EMBEDDING]),
        ("model.layers.0.self_attn.k_proj.bias", vec![narrow]),
        ("model.layers.0.self_attn.v_proj.weight", vec![narrow, EMBEDDING]),
        ("model.layers.0.self_attn.o_proj.weight", vec![EMBEDDING, EMBEDDING]),
        ("model.layers.0.mlp.gate_proj.weight", vec![32, EMBEDDING]),
        ("model.layers.0.mlp.up_proj.weight", vec![32, EMBEDDING]),
        ("model.layers.0.mlp.down_proj.weight", vec![EMBEDDING, 32]),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", vec![4]),
    ];
    put_weights(&folder.path().join("model.safetensors"), &tensors);
    put(&folder, "config.json", &config);
    put(&folder, "tokenizer.json", &tokenizer);
    (folder, config, tokenizer)
}

fn put(folder: &TempDir, name: &str, value: &Value) {
    fs::write(folder.path().join(name), value.to_string()).unwrap();
}

fn put_weights(path: &Path, tensors: &[(&str, Vec<usize>)]) {
    let (mut head, mut data) = (serde_json::Map::new(), Vec::new());
    for (n, (name, shape)) in tensors.iter().enumerate() {
        let from = data.len();
        data.extend(numbers(n as u32, shape.iter().product()).iter().flat_map(|x| x.to_le_bytes()));
        head.insert(name.to_string(), json!({"dtype": "F32", "shape": shape, "data_offsets": [from, data.len()]}));
    }
    let head = Value::Object(head).to_string();
    fs::write(path, [&(head.len() as u64).to_le_bytes()[..], head.as_bytes(), &data].concat()).unwrap();
}

fn converted(folder: &Path) -> Result<Gguf, ConvertError> {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("out.gguf");
    let source = crate::quantize::open(folder)?;
    Conversion::plan(source, "f32".parse().unwrap(), false)?.write(
        &path,
        false,
        &AtomicBool::new(false),
        &mut |_, _| (),
    )?;
    Ok(Gguf::open(&path)?)
}

fn weights(gguf: &Gguf, name: &str) -> Vec<f32> {
    let bytes = gguf.tensor_bytes(gguf.tensor(name).unwrap()).unwrap();
    let mut out = vec![0.0; bytes.len() / 4];
    Format::F32.dequantize(bytes, &mut out);
    out
}

#[test]
fn a_llama_folder_becomes_a_llama_file() {
    let (folder, ..) = llama();
    let gguf = converted(folder.path()).unwrap();
    assert_eq!(gguf.text("general.architecture").unwrap(), Some("llama"));
    for (key, number) in [
        ("llama.block_count", 1),
        ("llama.attention.head_count_kv", 1),
        ("llama.rope.dimension_count", 8),
        ("llama.vocab_size", 12),
        ("tokenizer.ggml.eos_token_id", 9),
        ("general.file_type", 0),
    ] {
        assert_eq!(gguf.number(key).unwrap(), Some(number), "{key}");
    }
    assert_eq!(gguf.text("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));
    assert_eq!(gguf.boolean("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    let tokens = gguf.texts("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens[4..], ["ab", "[PAD5]", "[PAD6]", "[PAD7]", "<|x|>", "<end>", "  ", "[PAD11]"]);
    // Normal, unused, control by its looks, control by name, user-defined.
    assert_eq!(
        gguf.integers("tokenizer.ggml.token_type").unwrap().unwrap().collect::<Vec<_>>(),
        [1, 1, 1, 1, 1, 5, 5, 5, 3, 3, 4, 5]
    );
    assert_eq!(gguf.texts("tokenizer.ggml.merges").unwrap().unwrap(), ["a b", "Ġ cĠd"]);
    assert!(crate::model::Hyperparameters::from_gguf(&gguf).is_ok());
    assert_eq!(gguf.tensors().count(), 12);
    assert_eq!(weights(&gguf, "token_embd.weight"), numbers(0, TOKENS * EMBEDDING));
}

/// The definition, `w.reshape(heads, 2, half, …).swapaxes(1, 2)`, written out.
#[test]
fn rows_of_queries_and_keys_come_in_the_order_of_the_norm_rope() {
    let (folder, ..) = llama();
    let gguf = converted(folder.path()).unwrap();
    let (head, half) = (8, 4);
    for (name, seed, rows, width) in [
        ("blk.0.attn_q.weight", 4, 16, EMBEDDING),
        ("blk.0.attn_k.weight", 5, 8, EMBEDDING),
        ("blk.0.attn_k.bias", 6, 8, 1),
    ] {
        let before = numbers(seed, rows * width);
        let mut expected: Vec<f32> = Vec::new();
        for h in 0..rows / head {
            for j in 0..half {
                for k in 0..2 {
                    let row = h * head + k * half + j;
                    expected.extend_from_slice(&before[row * width..][..width]);
                }
            }
        }
        assert_eq!(weights(&gguf, name), expected, "{name}");
    }
    assert_eq!(weights(&gguf, "blk.0.attn_v.weight"), numbers(7, 8 * EMBEDDING));
}

#[test]
fn what_cannot_be_converted_is_named() {
    let refused = |change: &dyn Fn(&TempDir, &mut Value, &mut Value)| {
        let (folder, mut config, mut tokenizer) = llama();
        change(&folder, &mut config, &mut tokenizer);
        put(&folder, "config.json", &config);
        put(&folder, "tokenizer.json", &tokenizer);
        converted(folder.path()).unwrap_err().to_string()
    };
    let config_with = |key: &str, value: Value| refused(&|_, config, _| config[key] = value.clone());
    let says = |message: String, words: &str| assert!(message.contains(words), "{message}");
    says(config_with("architectures", json!(["MambaForCausalLM"])), "the architecture MambaForCausalLM");
    says(config_with("quantization_config", json!({"bits": 4})), "quantized already");
    says(config_with("num_local_experts", json!(8)), "a mixture of experts");
    says(config_with("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})), "rotary scaling \"yarn\"");
    says(config_with("hidden_size", json!("x")), "hidden_size: it is \"x\"");
    says(config_with("num_hidden_layers", json!(2)), "layer 1: no tensor of it is there");
    says(config_with("head_dim", json!(7)), "are not heads of 7");
    says(config_with("vocab_size", json!(9)), "is not below config.json's vocab_size, 9");
    says(config_with("vocab_size", json!(1u64 << 23)), "at most 4194304 is possible");
    let split = json!({"type": "Split", "pattern": {"Regex": "x+"}});
    says(refused(&|_, _, tokenizer| tokenizer["pre_tokenizer"] = split.clone()), "pre-tokenizer {\"pattern\"");
    says(refused(&|_, _, tokenizer| tokenizer["model"]["type"] = json!("Unigram")), "a Unigram tokenizer");
    says(refused(&|_, _, tokenizer| tokenizer["model"]["merges"] = json!(["ab"])), "\"ab\" is no pair");
    let odd: &dyn Fn(&TempDir, &mut Value, &mut Value) = &|folder, _, _| {
        put_weights(&folder.path().join("model.safetensors"), &[("model.layers.0.moe.weight", vec![2, 2])]);
    };
    says(refused(odd), "tensor model.layers.0.moe.weight cannot be converted");
    let (folder, ..) = llama();
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    says(converted(folder.path()).unwrap_err().to_string(), "a folder without tokenizer.json");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    says(converted(folder.path()).unwrap_err().to_string(), "a folder without *.safetensors");
}

#[test]
fn weights_may_be_spread_over_files_of_the_folder_only() {
    let (folder, ..) = llama();
    let rename = |to: &str| fs::rename(folder.path().join("model.safetensors"), folder.path().join(to)).unwrap();
    rename("model-00001-of-00001.safetensors");
    let index = |file: &str| json!({"weight_map": {"model.norm.weight": file}});
    put(&folder, "model.safetensors.index.json", &index("model-00001-of-00001.safetensors"));
    assert_eq!(converted(folder.path()).unwrap().tensors().count(), 12);
    for outside in ["../x.safetensors", "/x.safetensors", "..", ""] {
        put(&folder, "model.safetensors.index.json", &index(outside));
        let message = converted(folder.path()).unwrap_err().to_string();
        assert!(message.contains("no plain file name"), "{message}");
    }
    // One file, named; its folder says what it is.
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    let file = folder.path().join("model-00001-of-00001.safetensors");
    assert_eq!(converted(&file).unwrap().tensors().count(), 12);
}

#[test]
fn a_tokenizer_with_byte_fallback_gets_scores_from_its_merges() {
    let (folder, _, mut tokenizer) = llama();
    tokenizer["model"] = json!({
        "type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "merges": ["a b", "▁ ab"],
        "vocab": {"<unk>": 0, "<s>": 1, "<0x00>": 2, "ab": 3, "▁ab": 4, "a": 5, "b": 6, "▁": 7},
    });
    tokenizer["pre_tokenizer"] = Value::Null;
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    tokenizer["added_tokens"] =
        json!([{"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true}]);
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
    put(&folder, "tokenizer.json", &tokenizer);
    put(&folder, "tokenizer_config.json", &json!({"bos_token": {"content": "<s>"}, "chat_template": "hi"}));
    let gguf = converted(folder.path()).unwrap();
    assert_eq!(gguf.text("tokenizer.ggml.model").unwrap(), Some("llama"));
    assert_eq!(
        gguf.integers("tokenizer.ggml.token_type").unwrap().unwrap().collect::<Vec<_>>()[..8],
        [2, 3, 6, 1, 1, 1, 1, 1]
    );
    let scores: Vec<f32> = gguf.floats("tokenizer.ggml.scores").unwrap().unwrap().collect();
    assert_eq!(scores[..8], [0.0, -1000.0, 0.0, -1.0, -2.0, -3.0, -3.0, -3.0]);
    assert_eq!(gguf.boolean("tokenizer.ggml.add_space_prefix").unwrap(), Some(true));
    assert_eq!(gguf.boolean("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert_eq!(gguf.number("tokenizer.ggml.bos_token_id").unwrap(), Some(1));
    assert_eq!(gguf.text("tokenizer.chat_template").unwrap(), Some("hi"));
}

#[test]
fn frequencies_of_llama_3_are_written_as_a_tensor() {
    let (folder, mut config, _) = llama();
    config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    put(&folder, "config.json", &config);
    let gguf = converted(folder.path()).unwrap();
    let factors = weights(&gguf, "rope_freqs.weight");
    // The fastest stay as they are, the slowest are divided by the whole factor.
    assert_eq!((factors.len(), factors[0], factors[3]), (4, 1.0, 8.0));
    assert!(factors.windows(2).all(|pair| pair[0] <= pair[1]), "{factors:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn changed_files_never_panic(which in 0usize..3, changes in proptest::collection::vec((0.0f64..1.0, any::<u8>()), 1..5)) {
        let (folder, ..) = llama();
        let path = folder.path().join(["config.json", "tokenizer.json", "model.safetensors"][which]);
        let mut bytes = fs::read(&path).unwrap();
        // Of the weights' file, the head only.
        let most = bytes.len().min(1500);
        for (place, value) in changes {
            bytes[(place * most as f64) as usize] = value;
        }
        fs::write(&path, bytes).unwrap();
        let _ = converted(folder.path());
    }

    #[test]
    fn wild_values_never_panic(
        which in proptest::sample::select(vec![
            "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "head_dim", "vocab_size", "rope_scaling", "rope_theta", "rms_norm_eps", "eos_token_id",
        ]),
        value in proptest::sample::select(vec![
            json!(null), json!(0), json!(-1), json!(1), json!(3), json!(1e300), json!(u64::MAX), json!(4_294_967_295u64),
            json!("x"), json!([1]), json!({}), json!({"rope_type": "llama3", "factor": 0, "low_freq_factor": 0}),
            json!(["BertModel"]), json!(["Gemma3ForCausalLM"]), json!(["Phi3ForCausalLM"]), json!(["Qwen3ForCausalLM"]),
        ]),
    ) {
        let (folder, mut config, _) = llama();
        config[which] = value;
        put(&folder, "config.json", &config);
        let _ = converted(folder.path());
    }
}

/// Found by reading for the fuzzer: each made room for gigabytes.
#[test]
fn what_a_small_configuration_says_costs_little() {
    let (folder, config, _) = llama();
    for (key, value) in
        [("vocab_size", json!(1 << 22)), ("head_dim", json!(1 << 24)), ("hidden_size", json!(1u64 << 31))]
    {
        let mut config = config.clone();
        config[key] = value;
        config["rope_scaling"] = json!({"rope_type": "llama3"});
        put(&folder, "config.json", &config);
        let error = HuggingFace::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}
