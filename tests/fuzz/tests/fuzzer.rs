//! The targets under libFuzzer; `tests/fuzz/run` builds and calls it. `FUZZ_TARGET` names the target.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use quarry_fuzz::Target;

fuzz_target!(|input: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
        Target::named(&name).unwrap_or_else(|| panic!("there is no target {name}"))
    });
    target.run(input);
});
