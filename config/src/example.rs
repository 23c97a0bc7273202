//! The commented example, made from the table of keys and the defaults themselves.

use crate::Config;
use crate::keys::{KEYS, SECTIONS};

impl Config {
    /// A file that documents every key and changes none: each is commented out, with its default
    /// or, where there is none, with a sample.
    #[must_use]
    pub fn example() -> String {
        let defaults = Self::default();
        let mut text = String::from(
            "# Quarry's configuration. Every key is listed; a line that starts with `#name =` shows the\n\
             # default, or a sample where there is none. Flags of `quarry serve` win over this file.\n\
             # Sizes are written as \"64MiB\", durations as \"5s\". Relative paths start at this file's directory.\n",
        );
        for (section, about) in SECTIONS {
            text += &format!("\n# {about}\n[{section}]\n");
            for key in KEYS.iter().filter(|key| key.section() == section) {
                text.push('\n');
                for line in key.doc.lines() {
                    text += &format!("# {line}\n");
                }
                let default = (key.get)(&defaults);
                text += &format!(
                    "#{} = {}\n",
                    key.name(),
                    default.as_deref().unwrap_or(key.sample)
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_as_it_is_equals_the_defaults() {
        assert_eq!(
            Config::parse(&Config::example()).unwrap(),
            Config::default()
        );
    }

    #[test]
    fn example_with_the_defaults_uncommented_equals_the_defaults() {
        let defaults = Config::default();
        let mut text = String::new();
        let mut section = "";
        let example = Config::example();
        for line in example.lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']');
            }
            let key = line
                .strip_prefix('#')
                .and_then(|l| l.split_once(" = "))
                .map(|(name, _)| format!("{section}.{name}"));
            let has_default = key
                .and_then(|k| crate::keys::find(&k))
                .is_some_and(|k| (k.get)(&defaults).is_some());
            text.push_str(if has_default { &line[1..] } else { line });
            text.push('\n');
        }
        assert_ne!(text, example);
        assert_eq!(Config::parse(&text).unwrap(), defaults);
    }

    #[test]
    fn example_names_every_key_and_its_samples_are_valid() {
        let example = Config::example();
        for key in KEYS {
            assert!(
                example.contains(&format!("\n#{} = ", key.name())),
                "{}",
                key.path
            );
            if !key.sample.is_empty() {
                let text = format!("v = {}", key.sample);
                let table = toml::de::DeTable::parse(&text).unwrap();
                let (_, value) = table.get_ref().iter().next().unwrap();
                (key.set)(
                    &mut Config::default(),
                    value.get_ref(),
                    std::path::Path::new(""),
                )
                .unwrap();
            }
        }
    }
}
