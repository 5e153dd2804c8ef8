//! A picture of the times to the first token: their distribution per policy, as an SVG file.
#![forbid(unsafe_code)]

use std::fmt::Write;

use super::outcome::Outcome;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// Points per curve.
const POINTS: usize = 200;

/// Told apart also by people who see few colours (Okabe and Ito).
const COLOURS: [&str; 7] = [
    "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000",
];

/// Draws the cumulative distributions over a logarithmic axis of seconds.
pub fn svg(title: &str, outcomes: &[(&str, Outcome)]) -> String {
    let times = || outcomes.iter().flat_map(|(_, outcome)| &outcome.ttft_s);
    let least = times()
        .copied()
        .fold(f64::INFINITY, f64::min)
        .clamp(1e-3, 1e5);
    let most = times()
        .copied()
        .fold(0.0, f64::max)
        .clamp(least * 10.0, 1e6);
    let (low, high) = (least.log10().floor(), most.log10().ceil());
    let x = |seconds: f64| {
        let share = (seconds.max(least).log10() - low) / (high - low);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let y = |share: f64| TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
        escaped(title)
    );
    grid(&mut svg, low, high, &x, &y);
    for (index, (name, outcome)) in outcomes.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let mut path = String::new();
        for point in 0..=POINTS {
            let share = point as f64 / POINTS as f64;
            let letter = if point == 0 { 'M' } else { 'L' };
            let seconds = outcome.quantile(share);
            write!(path, "{letter}{:.1} {:.1}", x(seconds), y(share))
                .expect("invariant: strings grow");
        }
        let line = TOP + 20.0 * (index as f64 + 1.0);
        let edge = WIDTH - RIGHT + 12.0;
        write!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
             <path d=\"M{edge} {line}h18\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
             <text x=\"{}\" y=\"{}\">{} {:.2}</text>\n",
            edge + 24.0,
            line + 4.0,
            escaped(name),
            outcome.mean_ttft_s
        )
        .expect("invariant: strings grow");
    }
    svg += "</svg>\n";
    svg
}

fn grid(svg: &mut String, low: f64, high: f64, x: &dyn Fn(f64) -> f64, y: &dyn Fn(f64) -> f64) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let (line, text) = (y(share), y(share) + 4.0);
        *svg += &format!(
            "<path d=\"M{LEFT} {line}H{right}\" stroke=\"#dddddd\"/>\
             <text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{} %</text>\n",
            LEFT - 6.0,
            share * 100.0
        );
    }
    let mut power = low;
    while power <= high {
        let at = x(10_f64.powf(power));
        *svg += &format!(
            "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#dddddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
            bottom + 18.0,
            10_f64.powf(power)
        );
        power += 1.0;
    }
    *svg += &format!(
        "<text x=\"{LEFT}\" y=\"{}\">time to the first token in seconds; legend: means</text>\n",
        HEIGHT - 10.0
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_stay_inside_and_names_are_escaped() {
        let outcome = Outcome {
            ttft_s: vec![0.02, 0.5, 3.0, 40.0],
            mean_ttft_s: 10.88,
            ..Outcome::default()
        };
        let picture = svg(
            "a < b & c",
            &[("fused", outcome), ("none", Outcome::default())],
        );
        assert!(picture.contains("a &lt; b &amp; c") && picture.contains("fused 10.88"));
        assert_eq!(picture.matches("stroke-width").count(), 4);
        let curve = picture
            .lines()
            .find(|line| line.contains("fill=\"none\""))
            .unwrap();
        let path = curve.split('"').nth(1).unwrap();
        for point in path.split(['M', 'L']).filter(|point| !point.is_empty()) {
            let (x, y) = point.split_once(' ').unwrap();
            assert!(
                (LEFT..=WIDTH - RIGHT).contains(&x.parse().unwrap()),
                "{point}"
            );
            assert!(
                (TOP..=HEIGHT - BOTTOM).contains(&y.parse().unwrap()),
                "{point}"
            );
        }
        assert!(!picture.contains("NaN"));
    }
}
