//! Perplexity over KV cache, one curve a method, as SVG.

use plotters::coord::combinators::{BindKeyPoints, LogCoord};
use plotters::prelude::*;
use qcqa::files::SVG_MARK;

use crate::hints::CliError;

/// A curve: its name, and points (share of the KV cache, perplexity).
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Draws the curves, perplexity on a logarithmic scale, without what is not finite; `None` where nothing is.
pub(super) fn draw(title: &str, curves: &[Curve]) -> Result<Option<String>, CliError> {
    let finite = |curve: &Curve| curve.points.iter().copied().filter(|p| p.1.is_finite()).collect();
    let curves: Vec<_> = curves.iter().map(|c| Curve { name: c.name.clone(), points: finite(c) }).collect();
    let points = || curves.iter().flat_map(|c| c.points.iter().copied());
    let least = points().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let most = points().map(|p| p.1).fold(0.0, f64::max);
    if !(least > 0.0 && most.is_finite()) {
        return Ok(None);
    }
    let range = 0.9 * least..1.15 * most;
    let scale: LogCoord<f64> = range.clone().log_scale().into();
    let mut svg = String::new();
    let failed = |e: DrawingAreaErrorKind<_>| CliError::failed(format!("the plot cannot be drawn: {e}"));
    {
        let root = SVGBackend::with_string(&mut svg, (880, 520)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..1.05, scale.with_key_points(round_numbers(range)))
            .map_err(failed)?;
        chart
            .configure_mesh()
            .max_light_lines(1)
            .x_desc("KV cache, share of the source's")
            .y_desc("perplexity")
            .x_label_formatter(&|x| format!("{:.0}%", 100.0 * x))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()
            .map_err(failed)?;
        for (i, curve) in curves.iter().enumerate() {
            let color = Palette99::pick(i).mix(0.9);
            let line = LineSeries::new(curve.points.iter().copied(), color.stroke_width(2)).point_size(4);
            chart
                .draw_series(line)
                .map_err(failed)?
                .label(curve.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.4))
            .draw()
            .map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(Some(svg.replacen('>', &format!(">\n{SVG_MARK}"), 1)))
}

/// 10, 15, 20, 30, 50, 70 and so on, as far as they are in the range: about evenly spaced on a logarithmic scale.
fn round_numbers(range: std::ops::Range<f64>) -> Vec<f64> {
    let decades = range.start.log10().floor() as i32..=range.end.log10().floor() as i32;
    let of_decade = |decade| [1.0, 1.5, 2.0, 3.0, 5.0, 7.0].map(|digit| digit * 10f64.powi(decade));
    decades.flat_map(of_decade).filter(|number| range.contains(number)).collect()
}
