use super::*;
use crate::gguf::tiny::{Meta, Sizes, Tiny, VOCABULARY, llama, numbers};

fn load(tiny: &Tiny, slots: u32) -> Result<Model, String> {
    let gguf = Gguf::from_bytes(tiny.bytes()).map_err(|error| error.to_string())?;
    load_onto(Place::Cpu, Arc::new(gguf), &ModelOptions { slots, ..ModelOptions::default() })
}

/// With an equal share of blocks for each slot.
fn load_onto(place: Place, gguf: Arc<Gguf>, options: &ModelOptions) -> Result<Model, String> {
    let placement = Placement { place, backend: String::new(), numerics: String::new() };
    let mut model = Model::load(gguf, placement, options).map_err(|error| error.to_string())?;
    (0..options.slots).for_each(|slot| model.assign_share(slot).unwrap());
    Ok(model)
}

/// Ends a slot's sequence and makes it ready for another.
fn renew(model: &mut Model, slot: u32) {
    model.release(slot);
    model.assign_share(slot).unwrap();
}

fn entries(slot: u32, from: usize, tokens: &[u32]) -> Vec<StepEntry> {
    tokens.iter().zip(from as u32..).map(|(token, position)| StepEntry { token: *token, slot, position }).collect()
}

fn tokens(count: usize) -> Vec<u32> {
    numbers(9, count).iter().map(|number| ((number + 1.0) * 127.0) as u32).collect()
}

/// The same model written down as plainly as possible, one sequence at once, in `f64`.
fn plain(tiny: &Tiny, sizes: Sizes, tokens: &[u32]) -> Vec<Vec<f64>> {
    let tensor = |name: &str| -> Vec<f64> {
        let tensor = tiny.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        tensor.bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
    };
    let product = |name: &str, x: &[f64]| -> Vec<f64> {
        tensor(name).chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(tensor(name)).map(|(x, w)| x / (mean + 1e-5).sqrt() * w).collect()
    };
    let size = sizes.head_size as usize;
    let turn = |mut x: Vec<f64>, position: usize| -> Vec<f64> {
        for (n, pair) in x.chunks_exact_mut(2).enumerate() {
            let angle = position as f64 * 10_000f64.powf(-((n % (size / 2)) as f64) * 2.0 / size as f64);
            let (a, b) = (pair[0], pair[1]);
            (pair[0], pair[1]) = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos());
        }
        x
    };
    let embedding = (sizes.heads * sizes.head_size) as usize;
    let table = tensor("token_embd.weight");
    let mut rows: Vec<Vec<f64>> =
        tokens.iter().map(|t| table[*t as usize * embedding..][..embedding].to_vec()).collect();
    for n in 0..sizes.layers {
        let name = |part: &str| format!("blk.{n}.{part}.weight");
        let normed: Vec<_> = rows.iter().map(|x| norm(&name("attn_norm"), x)).collect();
        let keys: Vec<_> = normed.iter().enumerate().map(|(p, x)| turn(product(&name("attn_k"), x), p)).collect();
        let values: Vec<_> = normed.iter().map(|x| product(&name("attn_v"), x)).collect();
        for (p, x) in normed.iter().enumerate() {
            let q = turn(product(&name("attn_q"), x), p);
            let mut mixed = Vec::new();
            for (head, q) in q.chunks_exact(size).enumerate() {
                let kv = head / (sizes.heads / sizes.kv_heads) as usize * size;
                let score =
                    |p: usize| q.iter().zip(&keys[p][kv..]).map(|(a, b)| a * b).sum::<f64>() / (size as f64).sqrt();
                let scores: Vec<f64> = (0..=p).map(|p| score(p).exp()).collect();
                let total: f64 = scores.iter().sum();
                mixed.extend(
                    (0..size).map(|i| scores.iter().zip(&values).map(|(s, v)| s / total * v[kv + i]).sum::<f64>()),
                );
            }
            product(&name("attn_output"), &mixed).iter().zip(&mut rows[p]).for_each(|(y, x)| *x += y);
        }
        for x in &mut rows {
            let normed = norm(&name("ffn_norm"), x);
            let gate = product(&name("ffn_gate"), &normed);
            let up = product(&name("ffn_up"), &normed);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            product(&name("ffn_down"), &inner).iter().zip(x).for_each(|(y, x)| *x += y);
        }
    }
    let output = if sizes.own_output { "output.weight" } else { "token_embd.weight" };
    rows.iter().map(|x| product(output, &norm("output_norm.weight", x))).collect()
}

#[test]
fn it_computes_what_is_written_down_plainly() {
    let shapes = [
        Sizes::default(),
        Sizes { heads: 3, kv_heads: 3, own_output: true, ..Sizes::default() },
        Sizes { heads: 2, kv_heads: 1, head_size: 80, layers: 1, ..Sizes::default() },
    ];
    for sizes in shapes {
        let (tiny, tokens) = (llama(sizes), tokens(70));
        let expected = plain(&tiny, sizes, &tokens);
        let mut model = load(&tiny, 1).unwrap();
        let all: Vec<usize> = (0..tokens.len()).collect();
        let logits = model.step(&entries(0, 0, &tokens), &all).unwrap();
        assert_eq!(logits.rows(), tokens.len());
        for (position, expected) in expected.iter().enumerate() {
            for (got, expected) in logits.row(position).iter().zip(expected) {
                assert!(
                    (f64::from(*got) - expected).abs() < 1e-2 * (1.0 + expected.abs()),
                    "{sizes:?} {position}: {got} {expected}"
                );
            }
        }
    }
}

/// One chunk, single tokens, odd chunks, and beside other sequences: the same bits.
#[test]
fn bits_do_not_depend_on_chunks_or_company() {
    for kv_heads in [1, 2, 4] {
        let sizes = Sizes { kv_heads, feed_forward: 1700, ..Sizes::default() };
        let (tiny, tokens) = (llama(sizes), tokens(150));
        let mut model = load(&tiny, 3).unwrap();
        let all: Vec<usize> = (0..tokens.len()).collect();
        let whole = model.step(&entries(0, 0, &tokens), &all).unwrap();
        renew(&mut model, 0);
        for (position, token) in tokens.iter().enumerate() {
            let logits = model.step(&entries(0, position, &[*token]), &[0]).unwrap();
            assert!(logits.row(0) == whole.row(position), "one by one, {kv_heads} kv heads, {position}");
        }
        renew(&mut model, 0);
        let mut position = 0;
        for (turn, length) in [1, 2, 63, 5, 9, 31, 39].into_iter().enumerate() {
            let company: Vec<u32> = (0..turn as u32 * 3 + 1).collect();
            let mut step = entries(2, 0, &company);
            let first = step.len();
            step.extend(entries(0, position, &tokens[position..position + length]));
            step.extend(entries(1, turn, &[7]));
            let want: Vec<usize> = (first..first + length).collect();
            let logits = model.step(&step, &want).unwrap();
            for row in 0..length {
                assert!(
                    logits.row(row) == whole.row(position + row),
                    "in company, {kv_heads} kv heads, {position}+{row}"
                );
            }
            position += length;
            renew(&mut model, 2);
        }
        assert_eq!(position, 150);
    }
}

#[test]
fn impossible_entries_are_refused_and_slots_start_anew() {
    let mut model = load(&llama(Sizes { layers: 1, context_length: 64, ..Sizes::default() }), 2).unwrap();
    let refuse = |model: &mut Model, entries: &[StepEntry]| assert!(model.step(entries, &[]).is_err(), "{entries:?}");
    refuse(&mut model, &entries(2, 0, &[1]));
    refuse(&mut model, &entries(0, 1, &[1]));
    refuse(&mut model, &entries(0, 0, &[VOCABULARY as u32]));
    refuse(&mut model, &[entries(0, 0, &[1]), entries(1, 0, &[1]), entries(0, 1, &[1])].concat());
    let first = model.step(&entries(0, 0, &[1, 2]), &[1]).unwrap();
    refuse(&mut model, &entries(0, 0, &[1]));
    renew(&mut model, 0);
    model.release(99);
    assert_eq!(model.step(&entries(0, 0, &[1, 2]), &[1]).unwrap(), first);
    refuse(&mut model, &entries(0, 2, &[3; 63]));
}

/// Both were found by the fuzzer: the first made room for millions of layers, the second multiplied out of range.
#[test]
fn what_a_small_file_says_of_itself_costs_little() {
    let mut tiny = llama(Sizes::default());
    tiny.meta("llama.block_count", Meta::U32(1 << 24));
    let error = load(&tiny, 1).unwrap_err();
    assert!(error.contains("llama.block_count") && error.contains("20 tensors"), "{error}");
    let mut tiny = llama(Sizes::default());
    tiny.meta("llama.attention.head_count", Meta::U32(1 << 24))
        .meta("llama.attention.head_count_kv", Meta::U32(1 << 24))
        .meta("llama.attention.key_length", Meta::U32(1 << 24))
        .meta("llama.context_length", Meta::U32(1 << 24));
    assert!(load(&tiny, u32::MAX).is_err());
}

#[test]
fn models_that_cannot_run_are_refused_by_name() {
    let error = |change: &dyn Fn(&mut Tiny) -> &mut Tiny| {
        let mut tiny = llama(Sizes { layers: 1, ..Sizes::default() });
        change(&mut tiny);
        load(&tiny, 1).unwrap_err()
    };
    let other = error(&|tiny| tiny.meta("general.architecture", Meta::Text("mamba".into())));
    assert!(other.contains("the architecture \"mamba\" is not supported: \"llama\", \"qwen2\""), "{other}");
    assert!(error(&|tiny| tiny.meta("llama.expert_count", Meta::U32(8))).contains("mixture of experts"));
    assert!(error(&|tiny| tiny.without("llama.block_count")).contains("llama.block_count is missing"));
    assert!(error(&|tiny| tiny.without("blk.0.ffn_up.weight")).contains("tensor blk.0.ffn_up.weight is missing"));
    assert!(error(&|tiny| tiny.meta("llama.embedding_length", Meta::U32(128))).contains("where [128"));
    assert!(error(&|tiny| tiny.meta("llama.attention.head_count", Meta::U32(0))).contains("head_count"));
    assert!(error(&|tiny| tiny.meta("llama.attention.head_count_kv", Meta::U32(3))).contains("do not share"));
    assert!(error(&|tiny| tiny.meta("llama.rope.dimension_count", Meta::U32(8))).contains("8 rotated"));
    assert!(error(&|tiny| tiny.meta("llama.rope.scaling.type", Meta::Text("yarn".into()))).contains("\"yarn\""));
    assert!(error(&|tiny| tiny.meta("llama.rope.freq_base", Meta::F32(f32::NAN))).contains("llama.rope.freq_base"));
    let odd = error(&|tiny| tiny.tensor_f32("blk.0.attn_sinks.weight", &[2], &[0.0, 0.0]));
    assert!(odd.contains("tensor blk.0.attn_sinks.weight is not supported"), "{odd}");
}
