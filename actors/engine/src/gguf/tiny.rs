//! Writes small GGUF files for tests: single ones, and a whole tiny Llama with a tokenizer.

use std::path::PathBuf;

/// A metadata value to be written.
#[derive(Debug, Clone)]
pub enum Meta {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A tensor to be written: name, dimensions, ggml's format number, bytes.
#[derive(Debug, Clone)]
pub struct TinyTensor {
    pub name: String,
    pub dimensions: Vec<u64>,
    pub format: u32,
    pub bytes: Vec<u8>,
}

/// A file to be.
#[derive(Debug, Clone, Default)]
pub struct Tiny {
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<TinyTensor>,
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Tiny {
    pub fn meta(&mut self, key: &str, value: Meta) -> &mut Self {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.into(), value));
        self
    }

    pub fn without(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(known, _)| known != key);
        self.tensors.retain(|tensor| tensor.name != key);
        self
    }

    pub fn tensor_f32(&mut self, name: &str, dimensions: &[u64], values: &[f32]) -> &mut Self {
        assert_eq!(values.len() as u64, dimensions.iter().product::<u64>());
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensors.push(TinyTensor { name: name.into(), dimensions: dimensions.into(), format: 0, bytes });
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            match value {
                Meta::U32(number) => {
                    out.extend(4u32.to_le_bytes());
                    out.extend(number.to_le_bytes());
                }
                Meta::U64(number) => {
                    out.extend(10u32.to_le_bytes());
                    out.extend(number.to_le_bytes());
                }
                Meta::F32(number) => {
                    out.extend(6u32.to_le_bytes());
                    out.extend(number.to_le_bytes());
                }
                Meta::Bool(truth) => {
                    out.extend(7u32.to_le_bytes());
                    out.push(u8::from(*truth));
                }
                Meta::Text(text) => {
                    out.extend(8u32.to_le_bytes());
                    put_text(&mut out, text);
                }
                Meta::Texts(texts) => {
                    out.extend(9u32.to_le_bytes());
                    out.extend(8u32.to_le_bytes());
                    out.extend((texts.len() as u64).to_le_bytes());
                    texts.iter().for_each(|text| put_text(&mut out, text));
                }
                Meta::I32s(numbers) => {
                    out.extend(9u32.to_le_bytes());
                    out.extend(5u32.to_le_bytes());
                    out.extend((numbers.len() as u64).to_le_bytes());
                    numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
                }
                Meta::F32s(numbers) => {
                    out.extend(9u32.to_le_bytes());
                    out.extend(6u32.to_le_bytes());
                    out.extend((numbers.len() as u64).to_le_bytes());
                    numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
                }
            }
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.format.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + tensor.bytes.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.bytes);
        }
        out
    }

    /// Writes the file into `folder`.
    pub fn write(&self, folder: &std::path::Path) -> PathBuf {
        let path = folder.join("tiny.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// Numbers from −1 to 1, the same on every run.
pub fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Sizes of a tiny model.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub layers: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_size: u32,
    pub feed_forward: u32,
    pub context_length: u32,
    pub own_output: bool,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_size: 16,
            feed_forward: 160,
            context_length: 512,
            own_output: false,
        }
    }
}

/// Control tokens of the tiny model, behind its 256 bytes and one merge.
pub const START: u32 = 257;
pub const END: u32 = 258;
pub const VOCABULARY: usize = 259;

/// A Llama with random weights whose tokens are bytes (and "he").
pub fn llama(sizes: Sizes) -> Tiny {
    let Sizes { layers, heads, kv_heads, head_size, feed_forward, context_length, own_output } = sizes;
    let embedding = heads * head_size;
    let mut tiny = Tiny::default();
    tiny.meta("general.architecture", Meta::Text("llama".into()))
        .meta("general.name", Meta::Text("Tiny".into()))
        .meta("llama.block_count", Meta::U32(layers))
        .meta("llama.context_length", Meta::U32(context_length))
        .meta("llama.embedding_length", Meta::U32(embedding))
        .meta("llama.feed_forward_length", Meta::U32(feed_forward))
        .meta("llama.attention.head_count", Meta::U32(heads))
        .meta("llama.attention.head_count_kv", Meta::U32(kv_heads))
        .meta("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5))
        .meta("llama.rope.freq_base", Meta::F32(10_000.0));
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut hidden = '\u{100}'..;
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|byte| if printable(&byte) { char::from(byte) } else { hidden.next().unwrap() }.to_string())
        .collect();
    tokens.extend(["he".into(), "<|im_start|>".into(), "<|im_end|>".into()]);
    let mut kinds = vec![1; 257];
    kinds.extend([3, 3]);
    let template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    tiny.meta("tokenizer.ggml.model", Meta::Text("gpt2".into()))
        .meta("tokenizer.ggml.pre", Meta::Text("gpt-2".into()))
        .meta("tokenizer.ggml.tokens", Meta::Texts(tokens))
        .meta("tokenizer.ggml.token_type", Meta::I32s(kinds))
        .meta("tokenizer.ggml.merges", Meta::Texts(vec!["h e".into()]))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(END))
        .meta("tokenizer.chat_template", Meta::Text(template.into()));
    let mut seed = 0;
    let mut random = |tiny: &mut Tiny, name: &str, inputs: u32, outputs: u32, scale: f32| {
        seed += 1;
        let values: Vec<f32> = numbers(seed, (inputs * outputs) as usize).iter().map(|value| value * scale).collect();
        let dimensions = [u64::from(inputs), u64::from(outputs)];
        tiny.tensor_f32(name, &dimensions[..if outputs == 1 { 1 } else { 2 }], &values);
    };
    random(&mut tiny, "token_embd.weight", embedding, VOCABULARY as u32, 1.0);
    random(&mut tiny, "output_norm.weight", embedding, 1, 1.0);
    if own_output {
        random(&mut tiny, "output.weight", embedding, VOCABULARY as u32, 0.5);
    }
    for n in 0..layers {
        let name = |part: &str| format!("blk.{n}.{part}.weight");
        random(&mut tiny, &name("attn_norm"), embedding, 1, 1.0);
        random(&mut tiny, &name("attn_q"), embedding, heads * head_size, 0.3);
        random(&mut tiny, &name("attn_k"), embedding, kv_heads * head_size, 0.3);
        random(&mut tiny, &name("attn_v"), embedding, kv_heads * head_size, 0.3);
        random(&mut tiny, &name("attn_output"), heads * head_size, embedding, 0.3);
        random(&mut tiny, &name("ffn_norm"), embedding, 1, 1.0);
        random(&mut tiny, &name("ffn_gate"), embedding, feed_forward, 0.3);
        random(&mut tiny, &name("ffn_up"), embedding, feed_forward, 0.3);
        random(&mut tiny, &name("ffn_down"), feed_forward, embedding, 0.3);
    }
    tiny
}
