use burn::tensor::*;
fn numbers(rows: usize, columns: usize) -> Tensor<2> {
    let mut state = (rows * 31 + columns) as u32;
    let v: Vec<f32> = (0..rows * columns).map(|_| { state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); (state >> 8) as f32 / (1 << 23) as f32 - 1.0 }).collect();
    Tensor::from_data(TensorData::new(v, [rows, columns]), &Device::flex())
}
fn bits(t: Tensor<2>) -> Vec<f32> { t.into_data().try_into_vec().unwrap() }
#[test]
fn probe() {
    for (k, n) in [(64, 64), (64, 128), (64, 320), (64, 259), (1700, 64), (160, 64), (576, 960), (576, 3072), (1536, 576), (576, 49152), (576, 576), (64, 256), (256, 64), (640, 64), (1024,64),(640,128)] {
        let x = numbers(70, k);
        let w = numbers(k, n);
        let whole = bits(x.clone().slice([0..64]).matmul(w.clone()));
        let mut bad = vec![];
        for m in [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32, 33, 48, 63, 65, 70] {
            let part = bits(x.clone().slice([0..m]).matmul(w.clone()));
            let c = m.min(64) * n;
            if part[..c] != whole[..c] { bad.push(m) }
        }
        // rows in the middle
        let mid = bits(x.clone().slice([5..9]).matmul(w.clone()));
        println!("k {k} n {n}: differing m {bad:?} mid {}", mid[..] == whole[5 * n..9 * n]);
    }
    let x = numbers(64, 259);
    let s = |t: Tensor<2>| bits(activation::softmax(t, 1));
    println!("softmax {}", s(x.clone().slice([5..6])) == s(x.clone())[5 * 259..6 * 259]);
    let s = |t: Tensor<2>| bits(t.clone().square().mean_dim(1));
    println!("mean {}", s(x.clone().slice([5..6])) == s(x.clone())[5..6]);
    let s = |t: Tensor<2>| bits(activation::silu(t));
    for r in [1,2,3,5] { println!("silu {r} {}", s(x.clone().slice([5..5+r])) == s(x.clone())[5 * 259..(5+r) * 259]); }
    // time
    for (k, n) in [(576, 960), (576, 3072), (1536, 576), (576, 49152)] {
        let w = numbers(k, n);
        for m in [1, 2, 4, 8, 64] {
            let x = numbers(m, k);
            let t = std::time::Instant::now();
            let r = 10;
            for _ in 0..r { std::hint::black_box(x.clone().matmul(w.clone())); }
            println!("time {k}x{n} m {m}: {:?}", t.elapsed() / r);
        }
    }
}
