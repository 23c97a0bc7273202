//! That the code has the fields of the protocol's text, by name and number, in its order: that it was made of this
//! text.

use std::collections::BTreeMap;
use std::path::Path;

/// The numbers of a message's fields, by message and field, names as the code has them.
type Fields = BTreeMap<(String, String), u32>;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(path).expect("the file is there")
}

/// `VolumeUsage` as `volume_usage`, `RPC` as `rpc`.
fn snake(name: &str) -> String {
    let mut text = String::new();
    let mut before_is_small = false;
    for c in name.chars() {
        if c.is_ascii_uppercase() && before_is_small {
            text.push('_');
        }
        before_is_small = c.is_ascii_lowercase();
        text.push(c.to_ascii_lowercase());
    }
    text
}

/// Of the text: `[repeated] type name = number …;` within messages and the `oneof`s in them.
fn of_text() -> Fields {
    let mut fields = Fields::new();
    let mut within: Vec<Option<String>> = Vec::new();
    for line in read("proto/csi.proto").lines() {
        let line = line.split("//").next().unwrap_or_default().trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        if line.ends_with('{') {
            within.push(match words[0] {
                "message" => Some(snake(words[1].trim_end_matches('{'))),
                // Its fields are its message's.
                "oneof" => within.last().cloned().flatten(),
                _ => None,
            });
        } else if line.starts_with('}') {
            within.pop();
        } else if let (Some(Some(message)), Some(at)) =
            (within.last(), words.iter().position(|word| *word == "="))
            && at >= 2
            && words[0] != "option"
        {
            let number = words[at + 1].trim_end_matches(';');
            let number = number.parse().expect("a field has a number");
            fields.insert((message.clone(), words[at - 1].to_owned()), number);
        }
    }
    fields
}

/// Of the code: `#[prost(…, tag = "number")]` before a field of a struct, or before a case of an enum, which is in
/// its message's module.
fn of_code() -> Fields {
    let mut fields = Fields::new();
    let (mut message, mut tag) = (String::new(), None);
    let mut modules: Vec<(usize, String)> = Vec::new();
    let text = read("src/v1.rs");
    for line in text.lines() {
        let (indent, line) = (line.len() - line.trim_start().len(), line.trim());
        if line.starts_with("pub mod identity_") {
            break;
        }
        if let Some(name) = line.strip_prefix("pub mod ") {
            modules.push((indent, name.trim_end_matches(" {").to_owned()));
        } else if line == "}" {
            modules.retain(|(at, _)| *at < indent);
        } else if let Some(name) = line.strip_prefix("pub struct ") {
            message = snake(name.split([' ', '{']).next().unwrap_or_default());
        } else if line.starts_with("pub enum ") {
            message = modules.last().map(|(_, m)| m.clone()).unwrap_or_default();
        } else if let Some(attribute) = line.strip_prefix("#[prost(") {
            let number = attribute.split("tag = \"").nth(1);
            tag = number.and_then(|text| text.split('"').next()?.parse().ok());
        } else if let Some(number) = tag.take() {
            let name = line.trim_start_matches("pub ").split([':', '(']).next();
            let name = name.unwrap_or_default().trim_start_matches("r#");
            fields.insert((message.clone(), snake(name)), number);
        }
    }
    fields
}

#[test]
fn code_has_the_fields_of_the_text_with_their_numbers() {
    let (text, code) = (of_text(), of_code());
    assert!(code.len() > 120, "{} fields", code.len());
    for (field, number) in &code {
        assert_eq!(text.get(field), Some(number), "{field:?}");
    }
    // What the driver has nothing to do with is left out.
    let is_left_out = |message: &str| {
        ["group", "metadata"]
            .iter()
            .any(|part| message.contains(part))
    };
    for field in text.keys().filter(|(message, _)| !is_left_out(message)) {
        assert!(code.contains_key(field), "{field:?} is not in the code");
    }
}
