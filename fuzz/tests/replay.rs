//! Every target over its seeds (`seeds/TARGET/*`: inputs that once failed, and
//! examples) and over a fixed stream of mutated ones: what CI can do in
//! seconds. `cargo fuzz` goes on from there.

use std::path::Path;

/// xorshift64*: the same inputs on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[test]
fn seeds_and_mutations_never_panic() {
    let rounds = if std::env::var_os("STABLEIO_QUICK").is_some() { 2_000 } else { 20_000 };
    for (name, target) in stableio_fuzz::TARGETS {
        let mut seeds: Vec<Vec<u8>> = vec![vec![], vec![0; 4096], vec![0xff; 4096]];
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
        for entry in std::fs::read_dir(&dir).into_iter().flatten() {
            seeds.push(std::fs::read(entry.unwrap().path()).unwrap());
        }
        seeds.iter().for_each(|seed| target(seed));
        let mut random = Random(0x5eed);
        for _ in 0..rounds {
            let mut input = seeds[random.next() as usize % seeds.len()].clone();
            input.resize(input.len().min(64 + random.next() as usize % 4096), 0);
            for _ in 0..1 + random.next() % 16 {
                if input.is_empty() {
                    break;
                }
                let at = random.next() as usize % input.len();
                input[at] = random.next() as u8;
            }
            target(&input);
        }
    }
}
