//! What is said of a volume's data keys.

use super::table::bytes;
use crate::control::{DataKeyInfo, RekeyInfo};

/// What was done: with `data` a new data key was made.
pub(super) fn rekey_text(rekeyed: &RekeyInfo, data: bool) -> String {
    let RekeyInfo {
        volume,
        key,
        keys,
        data_keys,
    } = rekeyed;
    let newest = data_keys.last().filter(|_| data);
    match (newest, keys) {
        (Some(newest), _) => {
            let generation = newest.generation;
            let earlier = earlier_text(data_keys);
            let text = format!(
                "{volume}: what is written is encrypted with data key {generation}, wrapped by key {key}"
            );
            [text]
                .into_iter()
                .chain(earlier)
                .collect::<Vec<_>>()
                .join("\n")
        }
        (None, 1) => format!("{volume}: its data key is wrapped by key {key}"),
        (None, keys) => format!("{volume}: its {keys} data keys are wrapped by key {key}"),
    }
}

/// Of a volume that has more than one.
pub(super) fn data_keys_text(data_keys: &[DataKeyInfo]) -> Option<String> {
    let newest = data_keys.last()?.generation;
    let earlier = earlier_text(data_keys);
    let parts = [format!("{newest} for what is written")];
    let text = parts
        .into_iter()
        .chain(earlier)
        .collect::<Vec<_>>()
        .join("; ");
    (data_keys.len() > 1).then_some(text)
}

/// What is still encrypted with each key but the newest.
fn earlier_text(data_keys: &[DataKeyInfo]) -> Vec<String> {
    let earlier = data_keys
        .split_last()
        .map_or(&[][..], |(_, earlier)| earlier);
    let one = |key: &DataKeyInfo| {
        let generation = key.generation;
        let chunks = match (key.chunks, key.stored_bytes) {
            (Some(chunks), Some(stored)) => format!("{chunks} chunks ({})", bytes(stored)),
            _ => "what was written before".to_owned(),
        };
        let snapshots = match &key.snapshots[..] {
            [] => String::new(),
            names => format!(", of which snapshots need some: {}", names.join(", ")),
        };
        format!("{generation} for {chunks} until it is encrypted anew{snapshots}")
    };
    earlier.iter().map(one).collect()
}
