//! Makes `src/v1.rs` of `proto/csi.proto`: `cargo run --manifest-path gateway/csi-proto/make/Cargo.toml`.

use std::error::Error;
use std::path::Path;

/// Parts of the names of services and messages that Quarry's driver has nothing to do with.
const LEFT_OUT: [&str; 3] = ["GroupController", "VolumeGroupSnapshot", "Metadata"];

fn is_left_out(name: Option<&String>) -> bool {
    name.is_some_and(|name| LEFT_OUT.iter().any(|part| name.contains(part)))
}

fn main() -> Result<(), Box<dyn Error>> {
    let top = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let proto = top.join("proto");
    let mut files = protox::compile([proto.join("csi.proto")], [&proto])?;
    for file in &mut files.file {
        // It goes by places, which are others then.
        file.source_code_info = None;
        file.service.retain(|s| !is_left_out(s.name.as_ref()));
        file.message_type.retain(|m| !is_left_out(m.name.as_ref()));
    }
    let out = std::env::temp_dir().join(format!("csi-proto-{}", std::process::id()));
    std::fs::create_dir_all(&out)?;
    tonic_prost_build::configure()
        .client_mod_attribute("csi.v1", "#[cfg(feature = \"client\")]")
        .out_dir(&out)
        .compile_fds(files)?;
    std::fs::copy(out.join("csi.v1.rs"), top.join("src/v1.rs"))?;
    std::fs::remove_dir_all(out)?;
    Ok(())
}
