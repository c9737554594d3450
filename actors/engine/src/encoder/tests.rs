use proptest::prelude::*;

use super::*;
use crate::gguf::tiny::{Meta, Tiny, numbers};

const WIDTH: u32 = 32;
const CONTEXT: u32 = 96;

/// A BERT with random weights whose words are single letters.
fn bert() -> Tiny {
    let mut tokens: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"].map(String::from).into();
    tokens.extend(('a'..='z').map(|letter| format!("\u{2581}{letter}")));
    let vocabulary = tokens.len() as u32;
    let mut tiny = Tiny::default();
    tiny.meta("general.architecture", Meta::Text("bert".into()))
        .meta("bert.block_count", Meta::U32(2))
        .meta("bert.context_length", Meta::U32(CONTEXT))
        .meta("bert.embedding_length", Meta::U32(WIDTH))
        .meta("bert.feed_forward_length", Meta::U32(48))
        .meta("bert.attention.head_count", Meta::U32(2))
        .meta("bert.attention.layer_norm_epsilon", Meta::F32(1e-12))
        .meta("bert.attention.causal", Meta::Bool(false))
        .meta("bert.pooling_type", Meta::U32(1))
        .meta("tokenizer.ggml.model", Meta::Text("bert".into()))
        .meta("tokenizer.ggml.token_type", Meta::I32s((0..vocabulary).map(|n| if n < 4 { 3 } else { 1 }).collect()))
        .meta("tokenizer.ggml.tokens", Meta::Texts(tokens))
        .meta("tokenizer.ggml.unknown_token_id", Meta::U32(1))
        .meta("tokenizer.ggml.cls_token_id", Meta::U32(2))
        .meta("tokenizer.ggml.seperator_token_id", Meta::U32(3));
    let mut seed = 0;
    let mut random = |name: &str, sizes: &[u32]| {
        seed += 1;
        let count = sizes.iter().product::<u32>() as usize;
        let sizes: Vec<u64> = sizes.iter().map(|size| u64::from(*size)).collect();
        tiny.tensor_f32(name, &sizes, &numbers(seed, count));
    };
    random("token_embd.weight", &[WIDTH, vocabulary]);
    random("position_embd.weight", &[WIDTH, CONTEXT]);
    random("token_types.weight", &[WIDTH, 2]);
    random("token_embd_norm.weight", &[WIDTH]);
    random("token_embd_norm.bias", &[WIDTH]);
    for n in 0..2 {
        let matrices = [("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH, WIDTH), ("attn_v", WIDTH, WIDTH)];
        for (name, inputs, outputs) in
            matrices.into_iter().chain([("attn_output", WIDTH, WIDTH), ("ffn_up", WIDTH, 48), ("ffn_down", 48, WIDTH)])
        {
            random(&format!("blk.{n}.{name}.weight"), &[inputs, outputs]);
            random(&format!("blk.{n}.{name}.bias"), &[outputs]);
        }
        for name in ["attn_output_norm", "layer_output_norm"] {
            random(&format!("blk.{n}.{name}.weight"), &[WIDTH]);
            random(&format!("blk.{n}.{name}.bias"), &[WIDTH]);
        }
    }
    tiny
}

fn load(tiny: &Tiny, options: &ModelOptions) -> Result<Encoder, String> {
    let gguf = Gguf::from_bytes(tiny.bytes()).map_err(|error| error.to_string())?;
    Encoder::load(gguf, options).map_err(|error| error.to_string())
}

fn refusal(change: impl FnOnce(&mut Tiny)) -> String {
    let mut tiny = bert();
    change(&mut tiny);
    load(&tiny, &ModelOptions::default()).unwrap_err()
}

#[test]
fn texts_become_embeddings_of_length_one() {
    let mut encoder = load(&bert(), &ModelOptions::default()).unwrap();
    assert_eq!((encoder.dimensions(), encoder.context_length(), encoder.pooling()), (32, 96, Pooling::Mean));
    assert_eq!(encoder.tokenize("A b").unwrap(), [2, 4, 5, 3]);
    let got = encoder.embed(&["a b", "", "b a"]).unwrap();
    assert_eq!(got[0], encoder.embed_tokens(&[vec![2, 4, 5, 3]]).unwrap()[0]);
    for embedding in &got {
        let square: f32 = embedding.iter().map(|x| x * x).sum();
        assert!((square - 1.0).abs() < 1e-5);
    }
    assert!(got[0] != got[1] && got[0] != got[2], "order counts");
    assert!(encoder.embed(&[]).unwrap().is_empty());
}

#[test]
fn what_cannot_be_embedded_is_refused_with_the_numbers() {
    let options = ModelOptions { context_length: Some(10), ..ModelOptions::default() };
    let mut encoder = load(&bert(), &options).unwrap();
    assert_eq!(encoder.context_length(), 10);
    assert!(encoder.embed(&["a b c d e f g h"]).is_ok());
    let why = encoder.embed(&["a", "a b c d e f g h i"]).unwrap_err().to_string();
    let due = "text 2 of 2 cannot be embedded: it has 11 tokens and this model takes 10 at most: shorten it, or embed it in parts";
    assert_eq!(why, due);
    let why = encoder.embed_tokens(&[vec![2, 30]]).unwrap_err().to_string();
    assert!(why.contains("token 30, where the model knows 30"), "{why}");
    let why = encoder.embed_tokens(&[vec![2], vec![]]).unwrap_err().to_string();
    assert!(why.starts_with("text 2 of 2") && why.contains("no tokens"), "{why}");
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let has = |why: String, parts: &[&str]| assert!(parts.iter().all(|part| why.contains(part)), "{why}");
    let architecture = |name: &str| refusal(|tiny| _ = tiny.meta("general.architecture", Meta::Text(name.into())));
    has(architecture("nomic-bert"), &["the architecture \"nomic-bert\" is not supported"]);
    has(architecture("llama"), &["a chat model (architecture \"llama\"), not an embedding model"]);
    has(refusal(|tiny| _ = tiny.meta("bert.pooling_type", Meta::U32(3))), &["the pooling 3 (last)", "2 (CLS)"]);
    has(refusal(|tiny| _ = tiny.without("bert.pooling_type")), &["does not name its pooling", "modules.json"]);
    has(refusal(|tiny| _ = tiny.meta("bert.attention.causal", Meta::Bool(true))), &["only what is before"]);
    has(refusal(|tiny| _ = tiny.meta("bert.attention.head_count", Meta::U32(4))), &["heads of width 8"]);
    has(refusal(|tiny| _ = tiny.meta("bert.attention.head_count", Meta::U32(5))), &["5 heads do not share"]);
    has(refusal(|tiny| _ = tiny.meta("tokenizer.ggml.model", Meta::Text("gpt2".into()))), &["\"gpt2\""]);
    has(refusal(|tiny| _ = tiny.meta("bert.context_length", Meta::U32(97))), &["position_embd", "97"]);
    has(refusal(|tiny| _ = tiny.without("blk.1.attn_v.bias")), &["tensor blk.1.attn_v.bias is missing"]);
    has(refusal(|tiny| _ = tiny.tensor_f32("cls.weight", &[1], &[0.0])), &["tensor cls.weight", "plain BERT"]);
    let gpu = Encoder::open_on(Path::new("x.gguf"), DeviceChoice::Gpu, &ModelOptions::default());
    has(gpu.unwrap_err().to_string(), &["on the CPU only", "`auto`"]);
}

#[test]
fn an_embedding_model_does_not_chat() {
    let gguf = Gguf::from_bytes(bert().bytes()).unwrap();
    let why = crate::model::Hyperparameters::from_gguf(&gguf).unwrap_err().to_string();
    assert!(why.contains("an embedding model (architecture \"bert\"), not a chat model"), "{why}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn an_embedding_does_not_depend_on_its_company(
        lengths in prop::collection::vec(1usize..CONTEXT as usize, 1..9), pass in 1u32..200, cls in any::<bool>(),
        seed in 0u32..1000,
    ) {
        let texts: Vec<Vec<u32>> = lengths.iter().zip(seed..).map(|(length, seed)| {
            numbers(seed, *length).iter().map(|x| ((x + 1.0) * 14.9) as u32).collect()
        }).collect();
        let mut tiny = bert();
        tiny.meta("bert.pooling_type", Meta::U32(if cls { 2 } else { 1 }));
        let options = |chunk, threads| ModelOptions { chunk, threads: Some(threads), ..ModelOptions::default() };
        let due = load(&tiny, &options(None, 2)).unwrap().embed_tokens(&texts).unwrap();
        prop_assert!(due.iter().flatten().all(|x| x.is_finite()));
        prop_assert_eq!(&load(&tiny, &options(Some(pass), 1)).unwrap().embed_tokens(&texts).unwrap(), &due);
        let mut alone = load(&tiny, &options(None, 2)).unwrap();
        for (text, due) in texts.iter().zip(&due).rev() {
            prop_assert_eq!(&alone.embed_tokens(std::slice::from_ref(text)).unwrap()[0], due);
        }
    }
}
