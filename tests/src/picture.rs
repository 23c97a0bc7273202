//! Pictures of dashboards: SVG drawn from a dashboard's JSON and a Prometheus' answers, with no Grafana and no browser.
//!
//! Owns: where panels stand, and what each kind looks like with Grafana's defaults in the light theme.
//! Does not own: the queries, which are the caller's.
//!
//! **Invariant:** every panel is drawn, with "No data" if it has none; what cannot be drawn as the JSON asks is an error.

mod chart;
mod table;
mod unit;

use std::fmt::{Display, Write as _};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use self::unit::{Unit, clock, trimmed};
use crate::prometheus::{Series, Window};

/// A cell of the grid, of which there are 24 beside each other, and the room between panels; all in pixels.
const COLUMN: f64 = 40.0;
const ROW: f64 = 32.0;
const GAP: f64 = 8.0;
const WIDTH: f64 = 24.0 * COLUMN + GAP;
/// What stands above the grid: the title, the variables, the time.
const HEAD: f64 = 44.0;
/// Room inside of a panel's frame.
const PAD: f64 = 10.0;

const STYLE: &str = "text{fill:#24292e}.t{font-size:17px;font-weight:500}.r{font-size:14px;font-weight:500}.w{font-weight:500}\
    .l{font-size:11px}.a{fill:#6b7078;font-size:10px}.e{text-anchor:end}.m{text-anchor:middle}\
    .v{font-size:28px;font-weight:500;fill:#3a9a44}.b{fill:#f4f5f5}.p{fill:#fff;stroke:#dfe0e3}\
    path{fill:none;stroke:#6b7078;stroke-width:1.3;stroke-linejoin:round;stroke-linecap:round}.g{stroke:#e9eaec}\
    .k{stroke-width:3;stroke-linecap:butt}.f{fill:#56a64b;fill-opacity:.15;stroke:none}\
    .c0{stroke:#56a64b}.c1{stroke:#e0a800}.c2{stroke:#3fa7d6}.c3{stroke:#f2711c}.c4{stroke:#e02f44}.c5{stroke:#1f60c4}\
    .c6{stroke:#a352cc}.c7{stroke:#705da0}.c8{stroke:#37732f}.c9{stroke:#8f6b00}";
const COLOURS: usize = 10;

/// One series under the name that the legend gives it.
struct Line {
    name: String,
    series: Series,
}

struct Panel<'a> {
    json: &'a Value,
    unit: Unit,
    width: f64,
    height: f64,
    lines: Vec<Line>,
}

/// Draws a dashboard. `ask` answers a panel's expression with its series.
///
/// # Errors
/// If the JSON has what cannot be drawn, or a question is not answered.
pub fn dashboard(
    json: &Value,
    window: Window,
    mut ask: impl FnMut(&str, Window) -> Result<Vec<Series>>,
) -> Result<String> {
    let mut body = head(json, window)?;
    let mut height = HEAD;
    for panel in json["panels"].as_array().context("panels")? {
        let title = panel["title"].as_str().context("a title")?;
        let (x, y) = (side(panel, "x")?, side(panel, "y")?);
        let (x, y) = (GAP + x * COLUMN, HEAD + y * ROW);
        height = height.max(y + side(panel, "h")? * ROW);
        let drawn = if panel["type"] == "row" {
            ensure!(panel["collapsed"] == false, "{title} hides its panels");
            text(18.0, 20.0, "r", title) + "<path d=\"M2 14l4 4 4-4\"/>"
        } else {
            let lines = lines(panel, window, &mut ask).with_context(|| title.to_owned())?;
            one(panel, lines, window).with_context(|| title.to_owned())?
        };
        writeln!(body, "<g transform=\"translate({x} {y})\">{drawn}</g>")?;
    }
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"Inter,Helvetica,Arial,sans-serif\" font-size=\"12\">\n<style>{STYLE}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" class=\"b\"/>\n{body}</svg>\n"
    ))
}

/// The line above the grid.
fn head(json: &Value, window: Window) -> Result<String> {
    let title = json["title"].as_str().context("a title")?;
    let mut drawn = text(GAP, 27.0, "t", title);
    let mut x = GAP + width_of(title, 17.0) + 24.0;
    let variables = &json["templating"]["list"];
    for variable in variables.as_array().context("variables")? {
        let label = variable["label"].as_str().context("a label")?;
        let value = variable["current"]["text"].as_str().unwrap_or("default");
        let words = format!("{label}: {value}");
        let width = width_of(&words, 12.0) + 20.0;
        drawn += &format!(
            "<rect x=\"{x:.0}\" y=\"11\" width=\"{width:.0}\" height=\"23\" rx=\"2\" class=\"p\"/>"
        );
        drawn += &text(x + 9.0, 27.0, "n", &words);
        x += width + GAP;
    }
    let time = format!("{} to {} UTC", clock(window.from), clock(window.to));
    Ok(drawn + &text(WIDTH - GAP, 27.0, "e", time) + "\n")
}

/// A place or a size in the grid.
fn side(panel: &Value, name: &str) -> Result<f64> {
    panel["gridPos"][name].as_f64().context("a place")
}

/// What there is to draw in a panel.
fn lines(
    panel: &Value,
    window: Window,
    ask: &mut impl FnMut(&str, Window) -> Result<Vec<Series>>,
) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for target in panel["targets"].as_array().context("targets")? {
        let expression = target["expr"].as_str().context("an expression")?;
        let form = target["legendFormat"].as_str().context("a legend")?;
        let is_instant = target["instant"] == true;
        let from = if is_instant { window.to } else { window.from };
        for series in ask(expression, Window { from, ..window })? {
            let name = legend(form, &series);
            lines.push(Line { name, series });
        }
    }
    lines.retain(|line| !line.series.samples.is_empty());
    Ok(lines)
}

/// A panel, from its own corner on.
fn one(json: &Value, lines: Vec<Line>, window: Window) -> Result<String> {
    let unit = &json["fieldConfig"]["defaults"]["unit"];
    let plain = json!({ "defaults": { "unit": unit, "min": 0 }, "overrides": [] });
    ensure!(json["fieldConfig"] == plain, "{}", json["fieldConfig"]);
    let is_plain = json["options"].is_null() && json["transformations"].is_null();
    ensure!(is_plain, "options or transformations");
    let panel = Panel {
        json,
        unit: Unit::named(unit.as_str().context("a unit")?)?,
        width: side(json, "w")? * COLUMN - GAP,
        height: side(json, "h")? * ROW - GAP,
        lines,
    };
    let (middle, half) = (panel.width / 2.0, panel.height / 2.0);
    let inside = match json["type"].as_str().context("a type")? {
        _ if panel.lines.is_empty() => text(middle, half + 4.0, "m", "No data"),
        "timeseries" => chart::graph(&panel, window)?,
        "stat" => chart::stat(&panel, window)?,
        "table" => table::table(&panel),
        other => bail!("a panel of type {other}"),
    };
    Ok(frame(&panel) + &inside)
}

/// A panel's background with its title and, as far as there is room, the mark of its description.
fn frame(panel: &Panel) -> String {
    let Panel { width, height, .. } = panel;
    let words = |name: &str| panel.json[name].as_str().unwrap_or_default();
    let (title, description) = (words("title"), escaped(words("description")));
    let mut frame = format!("<rect width=\"{width}\" height=\"{height}\" rx=\"2\" class=\"p\"/>");
    frame += &text(PAD, 19.0, "w", title);
    let x = PAD + width_of(title, 12.0) + 14.0;
    if !description.is_empty() && x < width - PAD {
        let mark = format!("<path d=\"M{x:.0} 10a5 5 0 1 0 .1 0m-.1 2.4v.1m0 2v3\"/>");
        frame += &format!("<g><title>{description}</title>{mark}</g>");
    }
    frame
}

/// A legend's template with a series' labels in it.
fn legend(form: &str, series: &Series) -> String {
    let mut parts = form.split("{{");
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (label, rest) = part.split_once("}}").unwrap_or((part, ""));
        name += series.labels.get(label.trim()).map_or("", String::as_str);
        name += rest;
    }
    name
}

fn text(x: f64, y: f64, class: &str, words: impl Display) -> String {
    let (x, y, words) = (trimmed(x, 1), trimmed(y, 1), escaped(&words.to_string()));
    format!("<text x=\"{x}\" y=\"{y}\" class=\"{class}\">{words}</text>")
}

/// As it stands between tags.
#[must_use]
pub fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;")
}

/// About how wide words are: whose font draws them is not known.
fn width_of(words: &str, size: f64) -> f64 {
    let letter = |c: char| match c {
        'i' | 'j' | 'l' | 't' | 'f' | 'r' | 'I' | ' ' | '.' | ',' | ':' | '/' => 0.35,
        'm' | 'w' | 'M' | 'W' | '%' => 0.9,
        c if c.is_ascii_uppercase() => 0.7,
        _ => 0.59,
    };
    words.chars().map(letter).sum::<f64>() * size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(labels: &[(&str, &str)]) -> Series {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let labels = labels.iter().map(owned).collect();
        let samples = vec![(0.0, 1.0), (2.0, 3.0)];
        Series { labels, samples }
    }

    fn drawn(kind: &str, unit: &str, answer: &[Series]) -> Result<String> {
        let panel = json!({
            "type": kind, "title": "A & B", "gridPos": { "x": 8, "y": 1, "w": 8, "h": 7 },
            "fieldConfig": { "defaults": { "unit": unit, "min": 0 }, "overrides": [] },
            "targets": [{ "expr": "up", "legendFormat": "{{tenant}} 50 %" }],
        });
        let json = json!({ "title": "T", "templating": { "list": [] }, "panels": [panel] });
        let (from, to, step) = (0, 120, 2);
        dashboard(&json, Window { from, to, step }, |_, _| Ok(answer.to_vec()))
    }

    #[test]
    fn legend_has_labels_in_its_template_and_nothing_for_what_is_not_there() {
        let series = series(&[("tenant", "acme"), ("volume", "db")]);
        let name = |form| legend(form, &series);
        assert_eq!(name("{{tenant}}/{{ volume }} 99 %"), "acme/db 99 %");
        assert_eq!(name("{{absent}} held"), " held");
        assert_eq!(name("volumes"), "volumes");
    }

    #[test]
    fn panel_stands_in_its_place_with_title_and_legend() {
        let picture = drawn("timeseries", "short", &[series(&[("tenant", "acme")])]).unwrap();
        for words in [
            "translate(328 76)",
            ">A &amp; B<",
            ">acme 50 %<",
            "height=\"300\"",
        ] {
            assert!(picture.contains(words), "{words}: {picture}");
        }
        assert!(!picture.contains("No data"), "{picture}");
    }

    #[test]
    fn panel_without_data_says_so() {
        for kind in ["timeseries", "stat", "table"] {
            let picture = drawn(kind, "s", &[]).unwrap();
            for words in [">A &amp; B<", ">No data<"] {
                assert!(picture.contains(words), "{words}: {picture}");
            }
        }
    }

    #[test]
    fn panel_that_cannot_be_drawn_is_refused() {
        assert!(drawn("heatmap", "s", &[series(&[])]).is_err());
        assert!(drawn("stat", "furlongs", &[series(&[])]).is_err());
    }

    #[test]
    fn table_has_a_column_a_label_and_cuts_what_is_too_long() {
        let long = "x".repeat(80);
        let series = series(&[("job", "quarry"), ("tenant", "acme"), ("way", &long)]);
        let picture = drawn("table", "short", &[series]).unwrap();
        for words in [">tenant<", ">acme<", ">way<", "xxx…<"] {
            assert!(picture.contains(words), "{words}: {picture}");
        }
        assert!(!picture.contains("quarry"), "{picture}");
    }
}
